#!/bin/sh
# Stands for journalctl on a fake booted host: what units printed, per boot, without times.
T=/run/testbed
boot=0 unit= lines=
while [ $# -gt 0 ]; do
  case $1 in
    -b|--boot) case ${2:-} in -*[0-9]|[0-9]*) boot=$2; shift ;; esac ;;
    -b*) boot=${1#-b} ;;
    --boot=*) boot=${1#*=} ;;
    -u|--unit) unit=$2; shift ;;
    --unit=*) unit=${1#*=} ;;
    -u*) unit=${1#-u} ;;
    -n|--lines) lines=$2; shift ;;
    --lines=*) lines=${1#*=} ;;
    -n*) lines=${1#-n} ;;
    -o|-p|--output|--priority|-t|--identifier|--since|--until|-S|-U) shift ;;
  esac
  shift
done
case $unit in ""|*.*) ;; *) unit=$unit.service ;; esac
read -r current < "$T/boot-number"
case $boot in -*) n=$((current + boot)) ;; *) n=$current ;; esac
d=$T/journal/$n
[ -d "$d" ] || { echo "Data from the specified boot ($boot) is not available" >&2; exit 1; }
if [ -n "$unit" ]; then set -- "$d/$unit.log"; else set -- "$d"/*.log; fi
if [ -n "$lines" ]; then cat "$@" 2> /dev/null | tail -n "$lines"; else cat "$@" 2> /dev/null; fi
exit 0

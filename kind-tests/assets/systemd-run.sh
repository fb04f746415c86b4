#!/bin/sh
# Stands for systemd-run on a fake booted host: the command runs apart from its caller; --wait and --pipe wait for it.
wait=0
while [ $# -gt 0 ]; do
  case $1 in
    --wait|-w|--pipe|-P|--pty|-t) wait=1 ;;
    -p|-E|-u|--unit|--property|--setenv|--on-active|--description) shift ;;
    --) shift; break ;;
    -*) ;;
    *) break ;;
  esac
  shift
done
echo "systemd-run $*" >> /run/testbed/systemctl.log
if [ $wait = 1 ]; then exec "$@"; fi
setsid "$@" < /dev/null >> /run/testbed/systemd-run.log 2>&1 &
exit 0

#!/bin/sh
# Stands for systemctl (and reboot, poweroff, halt, shutdown) on a fake booted host. Talks to the test bed's init
# through a FIFO; unit states are files:
#   /run/testbed/units/NAME   set by the test, wins
#   /run/testbed/state/NAME   set by init for units that it runs
#   /usr/lib/osimage-test/failed-units   names that the tree declares failed
# A unit that exists and that nobody speaks for is active; an unknown one is inactive.
T=/run/testbed
self=${0##*/}
echo "$self $*" >> "$T/systemctl.log"
case $self in
  reboot|poweroff|halt) set -- "$self" "$@" ;;
  shutdown) case " $* " in *" -r "*) set -- reboot ;; *) set -- poweroff ;; esac ;;
esac

verb= units= force=0 props= value=0 quiet=0 now=0 block=1 failed_only=0
while [ $# -gt 0 ]; do
  case $1 in
    -ff) force=2 ;;
    -f|--force) force=$((force + 1)) ;;
    --now) now=1 ;;
    --no-block) block=0 ;;
    --value) value=1 ;;
    -q|--quiet) quiet=1 ;;
    -p|--property) props="$props,$2"; shift ;;
    -P) props="$props,$2"; value=1; shift ;;
    --property=*) props="$props,${1#*=}" ;;
    -p*) props="$props,${1#-p}" ;;
    --failed|--state=failed) failed_only=1 ;;
    -t|--type|--state|-M|-H|-n|-o|--message) shift ;;
    -*) ;;
    *) if [ -z "$verb" ]; then verb=$1; else
         case $1 in *.*) units="$units $1" ;; *) units="$units $1.service" ;; esac
       fi ;;
  esac
  shift
done

tell() { printf '%s\n' "$*" > "$T/ctl"; }

file_of() {
  for d in /etc/systemd/system /run/systemd/system /usr/lib/systemd/system; do
    [ -e "$d/$1" ] && { echo "$d/$1"; return 0; }
  done
  return 1
}

state_of() {
  if [ -e "$T/units/$1" ]; then cat "$T/units/$1"
  elif [ -e "$T/state/$1" ]; then cat "$T/state/$1"
  elif grep -qsxF "$1" /usr/lib/osimage-test/failed-units; then echo failed
  elif file_of "$1" > /dev/null; then echo active
  else echo inactive
  fi
}

failed_units() {
  { cat /usr/lib/osimage-test/failed-units 2> /dev/null; ls "$T/units" "$T/state" 2> /dev/null | grep -v ':$'; } |
    sort -u | while read -r u; do
      [ -n "$u" ] && [ "$(state_of "$u")" = failed ] && echo "$u"
    done
}

property() { # name unit
  s=$(state_of "$2")
  case $1 in
    Id|Names) echo "$2" ;;
    LoadState) if file_of "$2" > /dev/null || [ -e "$T/units/$2" ] || [ -e "$T/state/$2" ]; then echo loaded; else echo not-found; fi ;;
    ActiveState) echo "$s" ;;
    SubState) case $s in active) echo running ;; failed) echo failed ;; activating) echo start ;; *) echo dead ;; esac ;;
    Result) case $s in failed) echo exit-code ;; *) echo success ;; esac ;;
    UnitFileState) if is_enabled "$2"; then echo enabled; else echo disabled; fi ;;
    FragmentPath) file_of "$2" ;;
    MainPID|ExecMainStatus|NRestarts) echo 0 ;;
    *) echo ;;
  esac
}

is_enabled() { ls /etc/systemd/system/*.wants/"$1" /usr/lib/systemd/system/*.wants/"$1" > /dev/null 2>&1; }

start() {
  case $1 in ostree-finalize-staged.service|ostree-finalize-staged-hold.service|*.target|*.path|*.timer) return 0 ;; esac
  rm -f "$T/state/$1"
  tell "$verb $1"
  [ $block = 0 ] && return 0
  n=0
  until [ -e "$T/state/$1" ] && [ "$(cat "$T/state/$1")" != activating ]; do
    n=$((n + 1)); [ $n -gt 1800 ] && return 1
    sleep 0.05
  done
  [ "$(cat "$T/state/$1")" != failed ]
}

enable() {
  file=$(file_of "$1") || { echo "Failed to enable unit: Unit file $1 does not exist." >&2; exit 1; }
  for target in $(sed -n 's/^WantedBy=//p' "$file"); do
    mkdir -p "/etc/systemd/system/$target.wants"
    ln -sf "$file" "/etc/systemd/system/$target.wants/$1"
  done
}

case $verb in
  reboot|poweroff|halt|kexec|soft-reboot) tell "$verb $force" ;;
  start|restart|try-restart|reload-or-restart)
    [ "$verb" = start ] || verb=restart
    for u in $units; do start "$u" || { echo "Job for $u failed." >&2; exit 1; }; done ;;
  stop|kill) for u in $units; do tell "stop $u"; done ;;
  enable|reenable)
    for u in $units; do enable "$u"; done
    if [ $now = 1 ]; then verb=start; for u in $units; do start "$u"; done; fi ;;
  disable)
    for u in $units; do rm -f /etc/systemd/system/*.wants/"$u"; [ $now = 1 ] && tell "stop $u"; done; exit 0 ;;
  is-enabled)
    rc=1; for u in $units; do if is_enabled "$u"; then rc=0; s=enabled; else s=disabled; fi; [ $quiet = 1 ] || echo $s; done; exit $rc ;;
  is-active)
    rc=3; for u in $units; do s=$(state_of "$u"); [ "$s" = active ] && rc=0; [ $quiet = 1 ] || echo "$s"; done; exit $rc ;;
  is-failed)
    rc=1; for u in $units; do s=$(state_of "$u"); [ "$s" = failed ] && rc=0; [ $quiet = 1 ] || echo "$s"; done; exit $rc ;;
  is-system-running)
    if [ -n "$(failed_units)" ]; then echo degraded; exit 1; else echo running; fi ;;
  list-units) if [ $failed_only = 1 ]; then for u in $(failed_units); do echo "$u loaded failed failed $u"; done; fi ;;
  reset-failed) for u in $units; do rm -f "$T/state/$u"; done ;;
  show)
    [ -n "$props" ] || props=Id,LoadState,ActiveState,SubState,Result,UnitFileState
    for u in $units; do
      for p in $(echo "$props" | tr ',' ' '); do
        v=$(property "$p" "$u")
        if [ $value = 1 ]; then echo "$v"; else echo "$p=$v"; fi
      done
    done ;;
  status)
    rc=3; for u in $units; do s=$(state_of "$u"); echo "$u: $s"; [ "$s" = active ] && rc=0; done; exit $rc ;;
  cat) for u in $units; do f=$(file_of "$u") && cat "$f"; done ;;
  daemon-reload|daemon-reexec|mask|unmask|isolate|set-default|preset|"") ;;
  *) echo "the test bed's systemctl does not know '$verb'" >&2; exit 1 ;;
esac
exit 0

#!/bin/sh
# The boot guard. On the first boots after an update it waits until the new system is confirmed; if that does not happen
# before the deadline, it makes the previous system the default and reboots. It needs sh, coreutils, sed, systemctl and
# one of the ways back below: no network, no container runtime, no daemon.
#
#   /var/lib/osimage/guard/pending   attempt= target= previous= deadline= boot=   written by the daemon, arms it
#   /var/lib/osimage/guard/acting    what pending was, and acted= the boot: the guard has begun to go back
#   /var/lib/osimage/guard/trials    the boots of the new system that were not confirmed, one a line
#   /var/lib/osimage/guard/result    attempt= result=confirmed|fellback|rolledback|stuck reason=
#   /run/osimage/confirmed           the attempt that the daemon confirms
#   /run/osimage/boot-start          boot= uptime=   when this boot was first seen
#
# Written by osimage-node-daemon; see its guard.rs.
set -u

state=/var/lib/osimage/guard
pending=$state/pending
acting=$state/acting
# The new system is booted so often at most: one that falls over before the deadline would come up for ever.
most_trials=3
run=/run/osimage
own=/var/lib/osimage/bin/osimage-node-daemon

say() { echo "osimage-guard: $*"; }

field() { sed -n "s/^$2=//p" "$1" 2> /dev/null | head -n 1; }

uptime_seconds() {
  read -r up _ < /proc/uptime
  echo "${up%%.*}"
}

# Written whole, or not at all: a power cut leaves the old one.
record() {
  printf 'attempt=%s\nresult=%s\nreason=%s\n' "$attempt" "$1" "$2" > "$state/result.new" || return
  sync "$state/result.new" 2> /dev/null || sync
  mv -f "$state/result.new" "$state/result"
  sync "$state" 2> /dev/null || sync
}

# The running deployment, as COMMIT.SERIAL. Its folder is the root; where the root is composed (composefs), the kernel
# command line names it.
booted() {
  root=$(stat -c %d:%i /)
  for folder in /sysroot/ostree/deploy/*/deploy/*; do
    if [ "$(stat -c %d:%i "$folder" 2> /dev/null)" = "$root" ]; then
      echo "${folder##*/}"
      return
    fi
  done
  read -r cmdline < /proc/cmdline
  for word in $cmdline; do
    case $word in
      ostree=*)
        link=$(readlink -f "/sysroot${word#ostree=}")
        echo "${link##*/}"
        return ;;
    esac
  done
}

boot_start() {
  mkdir -p "$run"
  if [ "$(field "$run/boot-start" boot)" != "$boot" ]; then
    printf 'boot=%s\nuptime=%s\n' "$boot" "$(uptime_seconds)" > "$run/boot-start.guard"
    mv -f "$run/boot-start.guard" "$run/boot-start"
  fi
  start=$(field "$run/boot-start" uptime)
  case $start in ''|*[!0-9]*) start=$(uptime_seconds) ;; esac
}

# Place of a commit in `ostree admin status`, from 0.
index_of() {
  index=0
  ostree admin status | while read -r first second third _; do
    case $first in \*) name=$third ;; *) name=$second ;; esac
    case $name in
      "$1".*) echo "$index"; break ;;
    esac
    [ "${#name}" -gt 65 ] && index=$((index + 1))
  done
}

# The ways back, best first: our own program, which knows the commit; then what the host has.
go_back() {
  # Each may wait for a lock that is never given up.
  limit=''
  command -v timeout > /dev/null && limit='timeout 120'
  if [ -x "$own" ] && why=$($limit "$own" guard-rollback --commit "$previous" 2>&1); then return; fi
  say "cannot go back with $own: ${why:-it is not there}"
  why="$previous is not among its deployments"
  index=$(index_of "$previous")
  if [ -n "$index" ] && why=$($limit ostree admin set-default "$index" 2>&1); then return; fi
  say "cannot go back with ostree: $why"
  if command -v rpm-ostree > /dev/null && why=$($limit rpm-ostree rollback 2>&1); then return; fi
  if command -v bootc > /dev/null && why=$($limit bootc rollback 2>&1); then return; fi
  return 1
}

# Notes that this boot is one of the new system; says how many there were.
count_trials() {
  grep -qx "$boot" "$state/trials" 2> /dev/null || echo "$boot" >> "$state/trials"
  trials=$(sort -u "$state/trials" 2> /dev/null | grep -c .)
  case $trials in ''|*[!0-9]*) trials=1 ;; esac
}

# Goes back and ends. What is in acting says that this has begun: a power cut leaves it to the next boot.
act() {
  say "attempt $attempt: $reason; going back to $previous"
  if ! go_back; then
    say "attempt $attempt: there is no way back; the host stays up"
    record stuck "$reason; there was no way back: ${why:-unknown}"
    exit 0
  fi
  record rolledback "$reason"
  sync
  # In order first; a shutdown that hangs is then shortened. Nothing is staged any more that this would lose.
  systemctl reboot
  sleep 120
  systemctl --force reboot
  sleep 60
  systemctl --force --force reboot
  exit 0
}

file=$pending
[ -e "$pending" ] || file=$acting
attempt=$(field "$file" attempt)
target=$(field "$file" target)
previous=$(field "$file" previous)
deadline=$(field "$file" deadline)
armed_on=$(field "$file" boot)
acted_on=$(field "$file" acted)
reason=$(field "$file" reason)
read -r boot < /proc/sys/kernel/random/boot_id
case $deadline in ''|*[!0-9]*) deadline=900 ;; esac

if [ -z "$attempt" ] || [ -z "$target" ] || [ -z "$previous" ]; then
  say "$file says nothing that can be acted on"
  exit 0
fi
if [ "$boot" = "$armed_on" ]; then
  say "attempt $attempt: armed for the next boot"
  exit 0
fi
boot_start

now=$(booted)
case $now in
  "$target".*) ;;
  '') say "attempt $attempt: cannot tell which system runs; taking it for the new one" ;;
  *)
    say "attempt $attempt: ${now%.*} runs, not $target: the host is back already"
    if [ "$file" = "$acting" ]; then
      record rolledback "$reason"
    else
      record fellback "the host booted ${now%.*} instead of $target"
    fi
    rm -f "$file"
    exit 0 ;;
esac

if [ "$file" = "$acting" ]; then
  if [ "$acted_on" != "$boot" ] && [ "$(field "$state/result" attempt)" = "$attempt" ]; then
    say "attempt $attempt: the host was sent back and booted $target again; it stays up"
    record stuck "$reason; the host was sent back and booted the new system again"
    rm -f "$acting"
    exit 0
  fi
  act
fi

count_trials
say "attempt $attempt: $target runs (boot $trials of it); it has to be confirmed within $deadline s"
reason="not confirmed within $deadline s of the boot: the node daemon did not run, or could not go back by itself"
if [ "$trials" -ge "$most_trials" ]; then
  reason="booted $trials times without being confirmed: the new system falls over before its deadline"
  deadline=0
fi
while [ $(($(uptime_seconds) - start)) -lt "$deadline" ]; do
  if [ "$(cat "$run/confirmed" 2> /dev/null)" = "$attempt" ]; then
    say "attempt $attempt: confirmed"
    record confirmed "confirmed by the node daemon"
    # Removed already by the daemon, which may have armed the next attempt.
    [ "$(field "$pending" attempt)" = "$attempt" ] && rm -f "$pending"
    exit 0
  fi
  if [ "$(field "$pending" attempt)" != "$attempt" ]; then
    say "attempt $attempt: disarmed"
    exit 0
  fi
  sleep 1
done

# From here on a confirmation comes too late: only one of us gets the file.
{ cat "$pending"; printf 'acted=%s\nreason=%s\n' "$boot" "$reason"; } > "$state/acting.new" 2> /dev/null
sync "$state/acting.new" 2> /dev/null || sync
mv "$pending" "$acting" 2> /dev/null || { rm -f "$state/acting.new"; say "attempt $attempt: disarmed"; exit 0; }
[ ! -s "$state/acting.new" ] || mv -f "$state/acting.new" "$acting"
sync "$state" 2> /dev/null || sync
act

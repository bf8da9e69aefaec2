#!/bin/sh
# A program that knows nothing of snapd, under `snapd run`: sort(1) has read half of its input, 50 MB of it, and waits
# for the rest. Meanwhile it is dumped; when the rest comes it goes on, and its output is right.
#
#     snapd daemon &
#     sh run.sh
#
# The daemon of another runtime directory is meant with SNAPD_RUNTIME_DIR. Any dynamically linked program of glibc will
# do in place of sort: redis-server, a JVM, an editor.
set -eu

snapd status >/dev/null # says in one sentence what is wrong when no daemon answers

scratch=$(mktemp -d)
pid=
trap 'test -z "$pid" || kill "$pid" || true; rm -rf "$scratch"' EXIT
mkfifo "$scratch/input"

# `snapd run` becomes the program: $! is its pid, and signals and exit status are its own.
LC_ALL=C snapd run -- sort -S 128M -o "$scratch/sorted" <"$scratch/input" &
pid=$!
exec 3>"$scratch/input"

seq -f 'line %07.0f of an input that is worth some memory' 1000000 -1 1 >&3

# Its agent joins by itself, which may take a moment.
tries=0
until snapd status "$pid" >/dev/null 2>&1; do
    tries=$((tries + 1))
    test "$tries" -lt 50
    sleep 0.2
done

snapd dump "$pid"
snapd status "$pid"

seq -f 'line %07.0f of an input that is worth some memory' 2000000 -1 1000001 >&3
exec 3>&- # the end of its input
status=0
wait "$pid" || status=$?
pid=

test "$status" -eq 0
seq -f 'line %07.0f of an input that is worth some memory' 1 2000000 | cmp - "$scratch/sorted"
echo "all 2000000 lines are there, and in order"

#!/bin/sh
# HAProxy, begun by Ray (-db -f FILE ...), with what Ray has no setting for. Ray writes FILE anew before each start, and
# finds the process by its id and arguments: so the file is changed in place, and this shell becomes HAProxy.
#
# - No statistics and no metrics over TCP: Ray would have them listen on all of the machine's addresses, where two
#   services also meet. Ray itself reads them, and sets servers, by a Unix socket, which is its owner's alone.
# - No splicing: with it a client that leaves before its answer begins is often not noticed, and its rows go on. Seen
#   with HAProxy 2.8 where a request's head and body come in two packets, as most clients send them.
# - A request's head must be whole by the time after which a silent client is left, however its bytes are spread.
set -eu
sed -i \
    -e '/^frontend prometheus/,/no log/d' \
    -e '/^listen stats/,$d' \
    -e '/option splice-/d' \
    -e 's/mode 666 level admin/mode 600 level admin/' \
    -e 's/^\( *\)timeout client \(.*\)$/&\n\1timeout http-request \2/' \
    "$3"
exec "$SEQMODELS_HAPROXY" "$@"

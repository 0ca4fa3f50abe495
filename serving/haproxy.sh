#!/bin/sh
# HAProxy, begun by Ray (-db -f FILE ...), with what Ray has no setting for. Ray writes FILE anew before each start, and
# finds the process by its id and arguments: so the file is changed in place, and this shell becomes HAProxy.
#
# - No statistics and no metrics over TCP: Ray would have them listen on all of the machine's addresses, where two
#   services also meet. Ray itself reads them, and sets servers, by a Unix socket, which is its owner's alone.
# - No splicing: with it a client that leaves before its answer begins is often not noticed, and its rows go on. Seen
#   with HAProxy 2.8 where a request's head and body come in two packets, as most clients send them.
# - A request's head must be whole by the time after which a silent client is left, however its bytes are spread.
# - Where the replicas have as many requests as they take, further ones are refused here, in the words of the service: a
#   replica that must read and refuse thousands a second has no time for anything else. Some places are kept, of all
#   replicas together, for questions such as GET /readyz.
set -eu
kept=64
refused='{"error":{"message":"the server has as many requests as it takes; try again later",'
refused="$refused"'"type":"rate_limit_error","param":null,"code":"queue_full"}}'
rule="http-request return status 429 content-type application/json string '$refused' hdr retry-after 1"
sed -i \
    -e '/^frontend prometheus/,/no log/d' \
    -e '/^listen stats/,$d' \
    -e '/option splice-/d' \
    -e 's/mode 666 level admin/mode 600 level admin/' \
    -e 's/^\( *\)timeout client \(.*\)$/&\n\1timeout http-request \2/' \
    -e "s|^\( *\)http-reuse always$|&\n\1$rule if METH_POST { nbsrv gt 0 } { be_conn_free ge 0 } { be_conn_free le $kept }|" \
    -e "s/^ *server .* check.*$/& maxconn $((SEQMODELS_MAX_REQUESTS + kept))/" \
    "$3"
exec "$SEQMODELS_HAPROXY" "$@"

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
# - For the same reason: where a replica says of a request that all like it will be refused for so many milliseconds
#   (x-refused-alike), they are refused here. Alike are requests with the same path, key, priority and time allowed, which
#   is all that such a refusal depends on, but for the replica: another may have had room. Only a digest of these is
#   kept, with the moment until which they are refused. Moments are of 30 bits, as a table holds 32, and so begin anew
#   every 12 days.
# - Ray reads a few headers as UTF-8 before the service sees a request, and fails on those that are none: what is no id is
#   replaced by one of Ray's, what is no time is given on as none that the service takes, the rest goes.
# - Ray reads a body as fast as it comes, however slowly it is taken, to notice clients that leave; the service does both
#   itself, and only so can a batch of any length be held back (x-request-disconnect-disabled).
# - No log: a request line may hold a prompt in its query. The service writes its own.
# - Where no replica is known, as while the service ends, Ray says that there is no such path, here or in plain text from
#   its own proxy, to which HAProxy then turns: no fault of the client's. The service's own 404 is JSON.
set -eu
kept=64
refused='{"error":{"message":"the server has as many requests as it can answer; try again later",'
refused="$refused"'"type":"rate_limit_error","param":null,"code":"queue_full"}}'
refuse="http-request return status 429 content-type application/json string '$refused' hdr retry-after 1"
alike='%[path] %[req.fhdr(authorization,1)] %[req.fhdr(x-request-priority,1)] %[req.fhdr(x-request-timeout-seconds,1)]'
now='date(0,ms),and(1073741823)'
timeout=x-request-timeout-seconds
gone='{"error":{"message":"this server is not ready, or is shutting down; send the request again",'
gone="$gone"'"type":"server_error","param":null,"code":"shutting_down"}}'
cat > "$3.rules" << END
    stick-table type binary len 20 size 100k expire 1s store gpt0
    $refuse if METH_POST { nbsrv gt 0 } { be_conn_free ge 0 } { be_conn_free le $kept }
    http-request set-var-fmt(txn.alike) "$alike" if METH_POST
    http-request track-sc0 var(txn.alike),sha1 if METH_POST
    http-request set-var(txn.until) sc0_get_gpt0 if METH_POST
    http-request set-var(txn.left) $now,neg,add(txn.until) if METH_POST
    $refuse if METH_POST { var(txn.left) -m int gt 0 } { var(txn.left) -m int le 1000 }
    http-request del-header x-request-id unless { req.fhdr(x-request-id) -m reg ^[a-zA-Z0-9._:=+/-]{1,128}$ }
    http-request set-header $timeout none if { req.fhdr($timeout) -m found } !{ req.fhdr($timeout) -m reg ^[!-~]+$ }
    http-request del-header ^serve.multiplexed.model.id$ -m reg
    http-request del-header ^x.session.id$ -m reg
    http-request set-header x-request-disconnect-disabled ?1
    http-response set-var(txn.alike_ms) res.hdr(x-refused-alike)
    http-response sc-set-gpt0(0) $now,add(txn.alike_ms) if { var(txn.alike_ms) -m found }
    http-response del-header x-refused-alike
    http-response return status 503 content-type application/json string '$gone' hdr retry-after 1 \
if { status 404 } { res.hdr(content-type) -m beg text/plain }
END
sed -i \
    -e '/^frontend prometheus/,/no log/d' \
    -e '/^listen stats/,$d' \
    -e '/option splice-/d' \
    -e '/^ *log .* local0 info$/d' \
    -e "s|return status 404 content-type text/plain lf-string .*|return status 503 content-type application/json string \
'$gone' hdr retry-after 1|" \
    -e 's/mode 666 level admin/mode 600 level admin/' \
    -e 's/^\( *\)timeout client \(.*\)$/&\n\1timeout http-request \2/' \
    -e "/^ *http-reuse always$/r $3.rules" \
    -e "s/^ *server .* check.*$/& maxconn $((SEQMODELS_MAX_REQUESTS + kept))/" \
    "$3"
exec "$SEQMODELS_HAPROXY" "$@"

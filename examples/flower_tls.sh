#!/usr/bin/env bash
# A deployment of flora on Flower, on this machine: a SuperLink and NODES (2) SuperNodes over TLS, each node known by its own key.
#
#   examples/flower_tls.sh APP [RUN.toml]     APP: written by `flora init flower APP`; RUN.toml: keys of the run that differ
#
# Needs flower-superlink, flwr (pip install 'flora[flower]'), openssl and ssh-keygen in PATH. PORT (19091) and one more a node are
# used. Certificates, keys and logs lie in $WORK (a temporary folder). Every process that is started here ends with this script.
set -euo pipefail
app=$(realpath "${1:?expected the folder of an app: flora init flower APP}")
run=${2:+$(realpath "$2")}
work=${WORK:-$(mktemp -d)}
port=${PORT:-19091}
nodes=${NODES:-2}
mkdir -p "$work/home"
export FLWR_HOME="$work/home" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1

started=()
tree() { local child; for child in $(pgrep -P "$1"); do echo "$child"; tree "$child"; done; }
stop() {                                    # what was started, and what that has started, by process id
    trap - EXIT INT TERM
    local pid all alive
    all=$(for pid in "${started[@]}"; do echo "$pid"; tree "$pid"; done)
    kill -TERM "${started[@]}" 2>/dev/null || true
    for _ in $(seq 60); do
        alive=$(for pid in $all; do if kill -0 "$pid" 2>/dev/null; then echo "$pid"; fi; done)
        [ -z "$alive" ] && break
        sleep 0.2
    done
    for pid in $alive; do kill -KILL "$pid" 2>/dev/null || true; done
}
trap stop EXIT
trap 'exit 130' INT TERM

cd "$work"
openssl req -x509 -newkey rsa:3072 -nodes -days 2 -subj /CN=flora-example-ca -keyout ca.key -out ca.crt 2>/dev/null
openssl req -newkey rsa:3072 -nodes -subj /CN=localhost -keyout server.key -out server.csr 2>/dev/null
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -out server.crt \
    -extfile <(printf 'subjectAltName=DNS:localhost,IP:127.0.0.1') 2>/dev/null
for node in $(seq 0 $((nodes - 1))); do rm -f "node-$node"*; ssh-keygen -q -t ecdsa -b 384 -N '' -C '' -f "node-$node"; done
cat > home/config.toml <<TOML
[superlink]
default = "secured"

[superlink.secured]
address = "127.0.0.1:$port"
root-certificates = "$work/ca.crt"
TOML

flower-superlink --ssl-ca-certfile ca.crt --ssl-certfile server.crt --ssl-keyfile server.key --enable-supernode-auth \
    --port "$port" > superlink.log 2>&1 &
started+=($!)
for node in $(seq 0 $((nodes - 1))); do     # a node that is not registered is turned away
    for _ in $(seq 60); do
        flwr supernode register "node-$node.pub" secured > "register-$node.log" 2>&1 && break
        sleep 1
    done
    grep -q 'registered successfully' "register-$node.log" || { cat superlink.log "register-$node.log" >&2; exit 1; }
    flower-supernode --root-certificates ca.crt --superlink "127.0.0.1:$port" --auth-supernode-private-key "node-$node" \
        --port $((port + 1 + node)) --ssl-ca-certfile ca.crt --ssl-certfile server.crt --ssl-keyfile server.key \
        --node-config "partition-id=$node num-partitions=$nodes" > "supernode-$node.log" 2>&1 &
    started+=($!)
done
flwr run "$app" secured --stream ${run:+--run-config "$run"} > >(tee run.log) 2>&1 &
started+=($!)
wait $!                                     # in the background, so that a signal is heard while it runs
if ! grep -q 'the run is in' run.log; then echo "the run has failed; logs are in $work" >&2; exit 1; fi

#!/usr/bin/env bash
# Builds the Kubernetes binaries that tests and demo run, from the pinned modules beside this file.
# Prints, as its last line, the folder they are in. The folder is keyed by the pins, so a second run builds nothing.
# With KUBEBUILDER_ASSETS set (as envtest has it), that folder is used as it is.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
if [ -n "${KUBEBUILDER_ASSETS:-}" ]; then
  for tool in etcd kube-apiserver kube-controller-manager kube-scheduler kubectl helm; do
    [ -x "$KUBEBUILDER_ASSETS/$tool" ] || { echo "KUBEBUILDER_ASSETS=$KUBEBUILDER_ASSETS lacks $tool: add it, or unset the variable to build all" >&2; exit 1; }
  done
  echo "$KUBEBUILDER_ASSETS"; exit 0
fi
cache=${XDG_CACHE_HOME:-$HOME/.cache}/osimage-operator
key=$(cat "$here"/*/go.mod "$here"/*/go.sum | sha256sum | cut -c1-16)
bin=$cache/kube-$key
[ ! -x "$cache/go/bin/go" ] || PATH=$cache/go/bin:$PATH   # where tools/setup.sh puts it if this machine has none
if [ ! -e "$bin/complete" ]; then
  mkdir -p "$bin"
  exec 9>"$bin/lock"; flock 9          # two make calls at once: the second waits and finds it done
  if [ ! -e "$bin/complete" ]; then
    v=$(sed -n 's/^require k8s.io\/kubernetes //p' "$here/kube/go.mod")
    minor=$(echo "$v" | cut -d. -f2)
    ld="-s -w"
    for p in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
      ld="$ld -X $p.gitVersion=$v -X $p.gitMajor=1 -X $p.gitMinor=$minor -X $p.gitCommit=unknown -X $p.gitTreeState=archive -X $p.buildDate=1970-01-01T00:00:00Z"
    done
    n=0; note="(once; all eight together take 6 to 20 minutes on 2 cores)"; export CGO_ENABLED=0
    build() { # module folder, package, output, linker flags
      n=$((n + 1)); echo "[$n/8] building $3 $note" >&2
      [ -x "$bin/$3" ] || (cd "$here/$1" && go build -trimpath -ldflags "$4" -o "$bin/$3.new" "$2" && mv "$bin/$3.new" "$bin/$3")
    }
    for t in kube-apiserver kube-controller-manager kube-scheduler kubelet kubectl; do
      build kube "k8s.io/kubernetes/cmd/$t" "$t" "$ld"
    done
    build etcd go.etcd.io/etcd/server/v3 etcd "-s -w"
    build kwok sigs.k8s.io/kwok/cmd/kwok kwok "-s -w -X sigs.k8s.io/kwok/pkg/consts.Version=0.8.0"
    build helm helm.sh/helm/v4/cmd/helm helm "-s -w"
    touch "$bin/complete"
  fi
fi
echo "$bin"

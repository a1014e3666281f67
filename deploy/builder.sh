# Read by the scripts that build images: which tool is used, and what is known of these sources.
# shellcheck shell=sh

# The first that works here (a docker without its daemon does not); CHREK_BUILDER names another or adds options.
builder=${CHREK_BUILDER:-}
for candidate in docker podman nerdctl buildah; do
    if [ -z "$builder" ] && command -v "$candidate" >/dev/null 2>&1 && "$candidate" info >/dev/null 2>&1; then
        builder=$candidate
    fi
done
[ -n "$builder" ] || fail "none of docker, podman, nerdctl and buildah works here; on Debian: apt-get install buildah"
builder_name=$(basename "${builder%% *}")

# CHREK_BUILDER may hold options of the program, so it is split into words.
# shellcheck disable=SC2086
tool() { $builder "$@"; }

if [ "$builder_name" = buildah ]; then
    build() { tool bud "$@"; }
else
    build() { tool build "$@"; }
fi

# The version is the chart's. A revision is known in a git checkout only; where files were changed it says so.
version=$(sed -n 's/^appVersion: *"\{0,1\}\([^"]*\)"\{0,1\}$/\1/p' "$root/deploy/helm/charts/chrek/Chart.yaml")
revision=$(git -C "$root" describe --match=none --always --abbrev=40 --dirty 2>/dev/null || echo unknown)
origin=$(git -C "$root" remote get-url origin 2>/dev/null || true)
case "$origin" in https://*@*) origin= ;; https://*) ;; *) origin= ;; esac

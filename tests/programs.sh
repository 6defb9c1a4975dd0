#!/bin/sh
# Programs that tests run for real and pip does not have: an ssh server, adb's client, a browser, Node.
set -eu
missing=""
{ command -v ssh && command -v scp; } >/dev/null || missing="$missing openssh-client"
{ command -v sshd || [ -x /usr/sbin/sshd ]; } >/dev/null || missing="$missing openssh-server"
command -v adb >/dev/null || missing="$missing adb"
{ command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null || missing="$missing chromium fonts-dejavu-core"
{ command -v node && command -v npm; } >/dev/null || missing="$missing nodejs npm"
[ -n "$missing" ] || exit 0
sudo=""
[ "$(id -u)" = 0 ] || sudo="sudo -n"
if command -v apt-get >/dev/null && $sudo true 2>/dev/null; then
    echo "installing$missing, which tests run"
    $sudo apt-get update -qq
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq $missing >/dev/null
else
    echo "the tests run these programs, please install them:$missing" >&2
    exit 1
fi

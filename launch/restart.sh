# Sourced by the scripts beside it: until_done COMMAND... starts it again after a crash or a kill of this or another
# process, and ends when it is over (exit 0: trained, or stopped by SIGTERM and saved), given bad input (2) or Ctrl-C (130).
until_done() {
    local status
    while true; do
        "$@" && return
        status=$?
        case $status in 2 | 130) return $status ;; esac
        echo "exit $status of $1; starting again in ${RESTART_S:-10} s" >&2
        sleep "${RESTART_S:-10}"
    done
}

# Runs the steps of a page in this one shell, file after file, as somebody would who types them. A command that fails ends it, and
# `verdict` says which; steps that print something else than the page says are listed in `wrong`.
set -e -o pipefail
trap 'status=$?; [ $status = 0 ] || [ -s verdict ] || echo "$run: \"$BASH_COMMAND\" ended with $status" > verdict' EXIT
for run in /first-steps/*.run; do
    step=${run%.run}
    echo "-- ${step##*/}"
    # One each: what is in the background may go on writing.
    log=${step##*/}.log
    if [ -e $step.type ]; then
        # From a pipe: who types does so bit by bit.
        . $run < <(cat $step.type) > $log 2>&1
    else
        . $run < /dev/null > $log 2>&1
    fi
    cat $log; echo
    # The pattern is one: not quoted.
    if [ -e $step.shows ] && [[ "$(tr -d '\r' < $log)" != $(cat $step.shows) ]]; then
        echo "step ${step##*/} prints something else than the page says" | tee -a wrong
    fi
done

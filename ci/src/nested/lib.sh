# What scenarios are written with. They run in the emulated machine, in a directory of their own, /run/$SCENARIO.
# Files there named *.log and *.console are quoted when the scenario fails.
HOST_IP=10.78.0.1
GUEST_IP=10.78.0.2
GUEST_MAC=02:00:00:00:78:02
# Port of the guest's command server.
SHELL_PORT=7000

# Ends the scenario: fail REASON…, skip REASON…
fail() { echo "$*" > verdict; witness; exit 1; }
skip() { echo "$*" > verdict; exit 77; }
# wrong REASON…: the scenario goes on, and has failed at its end.
wrong() { echo "wrong: $*"; echo "$*" >> wrong; }
# What every vmm that still runs is doing: its VM, its ports, and where its threads are, in what scheduling class.
witness() {
    for file in *.pid; do
        [ -e "$file" ] && [ -d "/proc/$(cat $file)" ] || continue
        who=${file%.pid}; pid=$(cat $file)
        echo "-- $who, process $pid"
        curl -s -m 2 --unix-socket $who.sock http://vmm/v1/vm http://vmm/v1/migrations; echo
        for task in /proc/$pid/task/*; do
            # Fields 40 and 41 of stat are priority and policy (1: real time), counted from behind the name.
            echo "$(cat $task/comm): $(sed 's/.*) //' $task/stat | cut -d ' ' -f 1,12,13,38,39); $(grep ctxt $task/status | tr '\n' ' ')"
            head -n 6 $task/stack 2>/dev/null
        done
    done
}
# note TEXT…: a figure for the report.
note() { echo "@@ note $SCENARIO $*"; }
# Seconds with hundredths since the machine was switched on; since BEGIN: those from then to now.
now() { cut -d ' ' -f 1 /proc/uptime; }
since() { echo "$(now) $1" | awk '{ printf "%.1f", $1 - $2 }'; }
# wait_for SECONDS COMMAND…: until the command succeeds; fails after that time.
wait_for() {
    left=$(($1 * 5)); shift
    until "$@" </dev/null >/dev/null 2>&1; do
        left=$((left - 1)); [ $left -gt 0 ] || return 1
        usleep 200000
    done
}
# load MODULE: a kernel module with those it needs.
load() {
    for m in $(cat /modules/$1.order); do
        grep -q "^$(echo $m | tr - _) " /proc/modules || insmod /modules/$m.ko || return 1
    done
}

# ----- networks -----
# bridge NAME [ADDRESS/BITS], tap NAME [BRIDGE]: interfaces that are up.
bridge() {
    brctl addbr $1; echo 0 > /sys/class/net/$1/bridge/multicast_snooping
    [ -n "$2" ] && ip addr add $2 dev $1
    ip link set $1 up
}
tap() { tunctl -t $1 >/dev/null; [ -n "$2" ] && brctl addif $2 $1; ip link set $1 up; }

# ----- monitors -----
# vmm_start NAME FLAGS…: a vmm in the background: NAME.console, NAME.log, REST at NAME.sock, its process in NAME.pid.
vmm_start() {
    name=$1; shift
    rm -f $name.sock $name.ended
    : > $name.console
    [ -n "$VERBOSE" ] && { tail -n +1 -f $name.console & tail -n +1 -F $name.log 2>/dev/null & }
    # Its status is kept by a shell that waits for it.
    (
        vmm --name $name --serial ${SERIAL:-$PWD/$name.console} --api-sock $PWD/$name.sock "$@" >>$name.log 2>&1 &
        echo $! > $name.pid
        wait $!
        echo $? > $name.ended.new; mv $name.ended.new $name.ended
    ) &
    wait_for 20 test -s $name.pid
}
# tls: what --tls needs for ports over loopback; the keys are made the first time.
tls() {
    [ -d $PWD/keys ] || { vmm keys new $PWD/keys && vmm keys host $PWD/keys host 127.0.0.1; } >&2 || return
    echo "cert=$PWD/keys/host.pem,key=$PWD/keys/host.key,ca=$PWD/keys/ca.pem"
}
# linux_start NAME "GUEST WORDS" FLAGS…: as vmm_start, with Debian's kernel and our init; the words go on its command line.
linux_start() {
    name=$1; words=$2; shift 2
    vmm_start $name --image ${KERNEL:-/guest/vmlinuz} --initrd /guest/initrd --memory ${MEMORY:-256M} \
        --cmdline "console=ttyS0 $KERNEL_WORDS panic=-1 $words" "$@"
}
# said NAME SECONDS TEXT: waits for a line of the console; fails the scenario when it does not come, or the vmm ends first.
said() {
    left=$(($2 * 5))
    until grep -q -- "$3" $1.console; do
        [ -e $1.ended ] && { grep -q -- "$3" $1.console && return; fail "$1 ended with $(cat $1.ended) before it said \"$3\""; }
        left=$((left - 1)); [ $left -gt 0 ] || fail "$1 has not said \"$3\" after $2 s"
        usleep 200000
    done
}
# ended NAME SECONDS STATUS: waits for the end of a vmm, which must have that exit status.
ended() {
    wait_for $2 test -e $1.ended || fail "$1 has not ended after $2 s"
    [ "$(cat $1.ended)" = $3 ] || fail "$1 ended with $(cat $1.ended), not $3"
}
# api NAME METHOD PATH [JSON]: a request; its answer on standard output, and what the server said on failure.
api() {
    if [ -n "$4" ]; then
        curl -sS --fail-with-body --unix-socket $1.sock -X $2 -H 'Content-Type: application/json' -d "$4" "http://vmm$3"
    else
        curl -sS --fail-with-body --unix-socket $1.sock -X $2 "http://vmm$3"
    fi
}
# state_is NAME STATE
state_is() { api $1 GET /v1/vm | grep -q "\"state\": *\"$2\""; }

# ----- the guest -----
# guest COMMANDS…: run in the guest over the network, with their output and their status. GUEST_IP says in which.
guest() {
    answer=$(mktemp answer.XXXXXX)
    printf '%s\necho "@status $?"\n' "$*" |
        timeout ${GUEST_LIMIT:-60} socat -t 3600 - TCP:$GUEST_IP:$SHELL_PORT,connect-timeout=5 > $answer 2>>guest.log
    grep -v '^@status' $answer
    code=$(sed -n 's/^@status //p' $answer); rm $answer
    return ${code:-255}
}
# order COMMANDS…: the same, but nobody waits: for what ends the guest, which may not get to answer.
order() { printf '%s\n' "$*" | timeout 20 socat -u - TCP:$GUEST_IP:$SHELL_PORT,connect-timeout=5 2>>guest.log; }
# generation: the guest's VM generation id, where vmm/src/layout.rs has it; Debian's kernel has no driver for it.
generation() { guest "devmem 0xff000 64; devmem 0xff008 64" | tr '\n' ' '; }
# guest_up NAME SECONDS [TIMES]: waits until the guest has said so for the TIMES-th time and answers.
guest_up() {
    count() { [ -e $1.ended ] || [ $(grep -c "GUEST: ready" $1.console) -ge $2 ]; }
    wait_for $2 count $1 ${3:-1} || fail "the guest $1 is not up after $2 s"
    [ -e $1.ended ] && fail "$1 ended with $(cat $1.ended)"
    wait_for 10 guest true || fail "the guest $1 is up but does not answer"
}
# needs FLAG…: skips the scenario while vmm has not all of these.
needs() {
    for flag in "$@"; do vmm --help | grep -q -e "$flag" || skip "vmm has no $flag"; done
}
# traffic TAP: a file to the guest and back, and pings; what the frames on the tap were like is left in $to and $from.
traffic() {
    ping -c 2 -W 5 -s 8000 $GUEST_IP >ping.log || fail "no answer to a ping of 8000 bytes"
    dd if=/dev/urandom of=/tmp/big bs=1M count=${MIB:-16} 2>/dev/null
    frames $1 tx; begin=$(now)
    guest "socat -u TCP-LISTEN:6000,reuseaddr CREATE:/tmp/big" >/dev/null &
    socat -u OPEN:/tmp/big TCP:$GUEST_IP:6000,retry=50,interval=0.2 || fail "the guest does not take the file"
    wait $! || fail "the guest cannot store the file"
    to="${MIB:-16} MiB in $(since $begin) s"; frames_since $1 tx; to="$to, $average bytes a frame"; to_average=$average
    socat -u TCP-LISTEN:6001,reuseaddr CREATE:/tmp/back & receiver=$!
    frames $1 rx; begin=$(now)
    guest "socat -u OPEN:/tmp/big TCP:$HOST_IP:6001,retry=50,interval=0.2; rm /tmp/big" || fail "the guest cannot send the file"
    wait $receiver
    from="${MIB:-16} MiB in $(since $begin) s"; frames_since $1 rx; from="$from, $average bytes a frame"; from_average=$average
    cmp /tmp/big /tmp/back || fail "the file has changed on its way"
    note "to the guest: $to; from the guest: $from"
}
# frames TAP rx|tx: begins to count; frames_since TAP rx|tx: average length since then.
frames() { bytes=$(cat /sys/class/net/$1/statistics/$2_bytes) packets=$(cat /sys/class/net/$1/statistics/$2_packets); }
frames_since() {
    bytes0=$bytes packets0=$packets; frames $1 $2
    average=$(((bytes - bytes0) / (packets - packets0 + 1)))
}
# travel: a guest moves to another vmm, and on to a third, while a TCP connection and a job that verifies what it has written run
# on. DISK: flags of its disk; DEVICE: how the guest calls it; without, the job works in memory.
travel() {
    bridge br0 $HOST_IP/24; tap tap0 br0; tap tap1 br0; tap tap2 br0
    linux_start vm0 "or.ip=$GUEST_IP/24" --cpus ${CPUS:-2} $DISK --tls ${TLS:-$(tls)} --net id=net0,tap=tap0,mac=$GUEST_MAC
    guest_up vm0 90
    # What the kernel says from here on is about the journey.
    guest "dmesg -c >/dev/null"
    guest "[ -z '$DEVICE' ] || /usr/sbin/mke2fs -q -t ext4 -F $DEVICE; sh /jobs/diskwork $DEVICE >/dev/null 2>&1 &"
    guest "socat TCP-LISTEN:6005,reuseaddr EXEC:cat >/dev/null 2>&1 &"
    # Numbered lines go to the guest and come back.
    lines() { i=0; while [ ! -e /tmp/enough ]; do i=$((i + 1)); echo "line $i"; usleep 20000; done; }
    lines | socat -t 30 - TCP:$GUEST_IP:6005,retry=50,interval=0.2 > /tmp/echoed & talk=$!
    rounds() { guest 'cat /tmp/rounds 2>/dev/null || echo 0'; }
    working() { [ $(rounds) -gt $1 ] && [ $(wc -l < /tmp/echoed) -gt $2 ]; }
    wait_for 60 working 9 20 || fail "the jobs do not begin: $(rounds) rounds, $(wc -l < /tmp/echoed) lines"

    id=$(generation)
    # The first time with all memory compared, which takes its time under emulation; the second time without.
    verify=true
    for n in 1 2; do
        vmm_start vm$n --receive 127.0.0.1:700$n --tls ${TLS:-$(tls)} --net id=net0,tap=tap$n
        listening() { netstat -ltn | grep -q ":700$n "; }
        wait_for 30 listening || fail "no receiving vmm"
        from=vm$((n - 1))
        api $from POST /v1/migrations "{\"to\":\"127.0.0.1:700$n\",\"verify\":$verify}" > job.log || fail "the port was refused: $(cat job.log)"
        gone() { [ -e $from.ended ] || api $from GET /v1/migrations | grep -q '"state": *"failed"'; }
        wait_for 90 gone
        state_is vm$n running || {
            api $from GET /v1/migrations > job.log
            fail "port $n: $(cat job.log)"
        }
        ended $from 20 0
        note "port $n: blackout $(api vm$n GET /v1/vm | grep -o '"blackout_us": *[0-9]*' | grep -o '[0-9]*$') us, verify $verify"
        verify=false
        [ "$(generation)" = "$id" ] || wrong "port $n has changed the VM generation id from $id to $(generation)"
        wait_for 30 working $(rounds) $(wc -l < /tmp/echoed) || fail "a job does not go on after port $n: $(cat /tmp/echoed | wc -l) lines, $(guest 'cat /tmp/rounds /tmp/differs')"
    done
    touch /tmp/enough; wait $talk
    awk '$2 != NR { print "line " NR " came back as: " $0; exit 1 }' /tmp/echoed || fail "the TCP connection lost or repeated something"
    wait_for 1 guest "touch /tmp/stop"
    stopped() { guest "test -e /tmp/stopped"; }
    wait_for 30 stopped || fail "the disk job found: $(guest cat /tmp/differs)"
    note "$(wc -l < /tmp/echoed) lines there and back, $(guest cat /tmp/rounds) rounds of the disk job"
    [ -z "$DEVICE" ] || guest "/usr/sbin/e2fsck -fn $DEVICE >/dev/null 2>&1" || fail "the file system is damaged"
    complaints=$(guest 'dmesg -c | grep -i -e "call trace" -e "soft lockup" -e "i/o error" -e "rcu.*stall"')
    [ -z "$complaints" ] || fail "the guest's kernel complains: $complaints"
}

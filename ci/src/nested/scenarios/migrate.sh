# A Linux guest moves to another vmm, and on to a third, while a TCP connection and a job that verifies its disk run on.
needs --initrd
truncate -s 64M /tmp/disk
bridge br0 $HOST_IP/24; tap tap0 br0; tap tap1 br0; tap tap2 br0
linux_start vm0 "or.ip=$GUEST_IP/24" --cpus ${CPUS:-2} --disk id=data,path=/tmp/disk --net id=net0,tap=tap0,mac=$GUEST_MAC
guest_up vm0 90
guest "/usr/sbin/mke2fs -q -t ext4 -F /dev/vda && (sh /jobs/diskwork /dev/vda >/dev/null 2>&1 &)"
guest "socat TCP-LISTEN:6005,reuseaddr EXEC:cat >/dev/null 2>&1 &"
# Numbered lines go to the guest and come back.
lines() { i=0; while [ ! -e /tmp/enough ]; do i=$((i + 1)); echo "line $i"; usleep 20000; done; }
lines | socat -t 30 - TCP:$GUEST_IP:6005,retry=50,interval=0.2 > /tmp/echoed & talk=$!
rounds() { guest 'cat /tmp/rounds 2>/dev/null || echo 0'; }
working() { [ $(rounds) -gt $1 ] && [ $(wc -l < /tmp/echoed) -gt $2 ]; }
wait_for 60 working 9 20 || fail "the jobs do not begin: $(rounds) rounds, $(wc -l < /tmp/echoed) lines"

for n in 1 2; do
    vmm_start vm$n --receive 127.0.0.1:700$n --net id=net0,tap=tap$n
    listening() { netstat -ltn | grep -q ":700$n "; }
    wait_for 30 listening || fail "no receiving vmm"
    from=vm$((n - 1))
    api $from POST /v1/migrations "{\"to\":\"127.0.0.1:700$n\",\"verify\":true}" > job.log || fail "the port was refused: $(cat job.log)"
    arrived() { state_is vm$n running || [ -e $from.ended ]; }
    gone() { [ -e $from.ended ] || api $from GET /v1/migrations | grep -q '"state": *"failed"'; }
    wait_for 90 gone
    state_is vm$n running || fail "port $n: $(api $from GET /v1/migrations)"
    ended $from 20 0
    note "port $n: blackout $(api vm$n GET /v1/vm | grep -o '"blackout_us": *[0-9]*' | grep -o '[0-9]*$') us"
    wait_for 30 working $(rounds) $(wc -l < /tmp/echoed) || fail "a job does not go on after port $n: $(cat /tmp/echoed | wc -l) lines, $(guest 'cat /tmp/rounds /tmp/differs')"
done
touch /tmp/enough; wait $talk
awk '$2 != NR { print "line " NR " came back as: " $0; exit 1 }' /tmp/echoed || fail "the TCP connection lost or repeated something"
wait_for 1 guest "touch /tmp/stop"
stopped() { guest "test -e /tmp/stopped"; }
wait_for 30 stopped || fail "the disk job found: $(guest cat /tmp/differs)"
note "$(wc -l < /tmp/echoed) lines there and back, $(guest cat /tmp/rounds) rounds of the disk job"
guest "/usr/sbin/e2fsck -fn /dev/vda >/dev/null 2>&1" || fail "the file system is damaged"
[ "$(guest 'dmesg | grep -c -i -e "call trace" -e "soft lockup" -e "I/O error"')" = 0 ] || fail "the guest's kernel complains: $(guest 'dmesg | tail -n 20')"

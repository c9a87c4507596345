# Reset by the guest (its own reboot, a crash) and from outside begin the guest again; the power button ends it in order.
needs --initrd
bridge br0 $HOST_IP/24; tap tap0 br0
linux_start inner "or.ip=$GUEST_IP/24" --net tap=tap0,mac=$GUEST_MAC
guest_up inner 60
id=$(generation)
order "reboot -f"
guest_up inner 60 2
order "echo c > /proc/sysrq-trigger"
guest_up inner 60 3
api inner PUT /v1/vm/reset >/dev/null || fail "no reset"
guest_up inner 60 4
[ ${#id} -gt 30 ] && [ "$(generation)" = "$id" ] || fail "resets have changed the VM generation id from $id to $(generation)"
api inner PUT /v1/vm/power-button >/dev/null || fail "no power button"
said inner 20 "GUEST: power button"
ended inner 20 0

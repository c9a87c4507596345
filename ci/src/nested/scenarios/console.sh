# What is typed on the console reaches the guest, and what it answers comes back: by a unix socket.
needs --initrd "socket="
SERIAL=socket=$PWD/tty.sock linux_start inner ""
wait_for 20 test -S tty.sock || fail "no socket for the console"
mkfifo keyboard
socat -t 1 - UNIX-CONNECT:tty.sock < keyboard >> inner.console & exec 3> keyboard
# Before the kernel knows its serial port.
echo 'echo "early $((1 + 1))"' >&3
said inner 60 "GUEST: ready"
said inner 20 "^early 2"
echo 'echo "typed $((40 + 2))"' >&3
said inner 20 "^typed 42"
# Longer than any buffer of the serial port.
long=$(head -c 300 /dev/zero | tr '\0' x)
echo "echo $long | md5sum" >&3
said inner 20 "$(echo $long | md5sum | cut -d ' ' -f 1)"
echo 'poweroff -f' >&3
ended inner 20 0

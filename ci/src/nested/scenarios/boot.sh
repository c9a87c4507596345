# Debian's kernel as it comes (bzImage), with an initrd: boots to its init, and its power button-less end is in order.
linux_start inner "or.job=poweroff"
said inner 60 "GUEST: kernel is up"
note "$(grep -o 'kernel is up after.*' inner.console)"
ended inner 20 0

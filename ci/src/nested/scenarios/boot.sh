# Debian's kernel as it comes (bzImage) boots to its init in the initrd, and switches itself off.
needs --initrd
linux_start inner "or.job=poweroff"
said inner 60 "GUEST: kernel is up"
note "$(grep -o 'kernel is up after.*' inner.console)"
ended inner 20 0

# Debian's kernel as an ELF image is started by its PVH note, finds its initrd, and switches itself off.
needs --initrd
KERNEL=/guest/vmlinux linux_start inner "or.job=poweroff" --boot pvh
said inner 60 "GUEST: kernel is up"
note "$(grep -o 'kernel is up after.*' inner.console)"
ended inner 20 0

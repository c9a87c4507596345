# A Linux guest with two vCPUs moves to another vmm and on to a third, while a TCP connection and a job in its memory run on.
needs --initrd --receive
travel

# A guest without an operating system that writes much, and by whose RAM alone one can tell whether
# it is of one moment. Each round writes the first and the last four bytes of 512 pages from
# 0x100000 on, in ascending order, with the low half of what the 64-bit counter at 0x8000 will be,
# and then adds one to the counter. So at any moment the pages hold one number, then the one before.
# (bench/src/lab/test/guest_ram.rs checks that.)
.set FIRST, 0x100000
.set END, FIRST + 512 * 0x1000
.set COUNTER, 0x8000
# Where the BIOS loads it; no linker adds it to the labels.
.set HERE, 0x7c00
.code16
.globl _start
_start:
    cli
    xor %ax, %ax
    mov %ax, %ds
    lgdtl gdt_at - _start + HERE
    mov %cr0, %eax
    or $1, %al
    mov %eax, %cr0
    ljmpl $8, $protected - _start + HERE
.code32
protected:
    mov $16, %ax
    mov %ax, %ds
    movl $0, COUNTER
    movl $0, COUNTER + 4
round:
    mov COUNTER, %eax
    inc %eax
    mov $FIRST, %edi
page:
    mov %eax, (%edi)
    mov %eax, 0xffc(%edi)
    add $0x1000, %edi
    cmp $END, %edi
    jb page
    addl $1, COUNTER
    adcl $0, COUNTER + 4
    mov $2000, %ecx
wait:
    loop wait
    jmp round
.balign 8
gdt:
    .quad 0
    .quad 0x00cf9a000000ffff # code: all 4 GiB
    .quad 0x00cf92000000ffff # data: the same
gdt_at:
    .word gdt_at - gdt - 1
    .long gdt - _start + HERE
.org 510
.word 0xaa55

// From the BIOS to 64-bit mode with every register of AVX-512 enabled, and the ways into machine.c. Everything runs in
// ring 0 with interrupts off. The first 512 MiB of memory are mapped to themselves, but for page 0: a null pointer
// faults.
  .section .boot, "ax"     // the boot sector: the BIOS loads it to 0x7c00 and jumps there in 16-bit mode
  .code16
  .globl boot
boot:
  ljmp $0, $1f
1: cli
  xor %ax, %ax
  mov %ax, %ds
  mov %ax, %es
  mov %ax, %ss
  mov $0x7c00, %sp
  mov $packet, %si
  mov $0x42, %ah           // read the rest of the image; dl is still the boot disk
  int $0x13
  mov $0x03, %ax           // a text screen, so that a terminal shows something sane
  int $0x10
  cli
  in $0x92, %al            // address line 20
  or $2, %al
  out %al, $0x92
  lgdt gdt_pointer
  mov %cr0, %eax
  or $1, %eax
  mov %eax, %cr0
  ljmp $24, $protected
  .balign 4
packet:                    // 63 sectors from sector 1 to 0x7e00
  .byte 16, 0
  .word 63
  .word 0x7e00, 0
  .quad 1
gdt: .quad 0, 0x00af9a000000ffff, 0x00cf92000000ffff, 0x00cf9a000000ffff  // 8 code64, 16 data, 24 code32
gdt_pointer: .word . - gdt - 1
  .long gdt
  .org 510
  .word 0xaa55

  .section .text
  .code32
protected:
  mov $16, %ax
  mov %ax, %ds
  mov %ax, %es
  mov %ax, %ss
  mov $0x70000, %edi       // page tables: levels 4, 3, 2 (pages of 2 MiB), and level 1 for the first 2 MiB
  mov $0x1000, %ecx
  xor %eax, %eax
  rep stosl
  movl $0x71003, 0x70000
  movl $0x72003, 0x71000
  mov $0x83, %eax
  mov $0x72000, %edi
1: mov %eax, (%edi)
  add $0x200000, %eax
  add $8, %edi
  cmp $0x72800, %edi       // 256 pages
  jne 1b
  movl $0x73003, 0x72000
  mov $0x1003, %eax
  mov $0x73008, %edi
2: mov %eax, (%edi)
  add $0x1000, %eax
  add $8, %edi
  cmp $0x74000, %edi
  jne 2b
  mov $0x70000, %eax
  mov %eax, %cr3
  mov $0x40620, %eax       // PAE, OSFXSR, OSXMMEXCPT, OSXSAVE
  mov %eax, %cr4
  mov $0xc0000080, %ecx
  rdmsr
  or $0x101, %eax          // long mode, syscall
  wrmsr
  mov $0x80010033, %eax    // paging, write protection, native x87 errors
  mov %eax, %cr0
  ljmp $8, $long_mode
  .code64
long_mode:
  xor %ecx, %ecx
  xor %edx, %edx
  mov $0xe7, %eax          // x87, SSE, AVX, opmask, both halves of ZMM
  xsetbv
  fninit
  movl $0x1f80, -8(%rsp)
  ldmxcsr -8(%rsp)
  mov $bss_begin, %edi
  mov $bss_end, %ecx
  sub %edi, %ecx
  xor %eax, %eax
  rep stosb
  mov $machine_stack_end, %esp
  call machine_main        // returns the stack pointer of the program
  mov %rax, %rsp
  mov program_entry, %rax
  xor %edx, %edx           // no function to run at exit
  jmp *%rax

  .globl syscall_entry
syscall_entry:             // rcx: where to return; r11: the flags. A system call changes these two and rax.
  mov %rsp, program_stack
  mov $machine_stack_end, %rsp
  push %rcx
  push %r11
  push %rdi
  push %rsi
  push %rdx
  push %r10
  push %r8
  push %r9
  mov %r10, %rcx           // the fourth argument
  mov %rax, %r8            // the number, in place of the fifth, which no call here has
  call on_syscall
  pop %r9
  pop %r8
  pop %r10
  pop %rdx
  pop %rsi
  pop %rdi
  pop %r11
  pop %rcx
  mov program_stack, %rsp
  push %r11
  popfq
  jmp *%rcx

  .globl exception_entries
  .balign 16
exception_entries:         // 16 bytes each
  .set vector, 0
  .rept 32
  .balign 16
  mov $vector, %edi
  jmp exception
  .set vector, vector + 1
  .endr
exception:
  mov (%rsp), %rsi         // the error code and rip, or rip and cs
  mov 8(%rsp), %rdx
  mov $machine_stack_end, %rsp
  call on_exception

  .bss
  .balign 16
program_stack: .skip 16
machine_stack: .skip 16384
machine_stack_end:

  .section .note.GNU-stack, "", @progbits

// A machine without an operating system that runs one static Linux program: see machine.py.
//
// The disk holds this image (64 sectors), a struct Header in sector 64, then, each from a sector of its own, the
// program and its standard input. At the end its outputs go where the header says. The program runs in ring 0; its
// system calls come to on_syscall, which knows those without which a static glibc program that reads stdin, allocates
// and writes stdout cannot live. All others fail, and such a program copes.
#include <elf.h>
#include <stddef.h>
#include <stdint.h>

typedef struct {
  int64_t program_bytes, input_bytes, output_sector;
  char argument[488];
} Header;
typedef struct {
  int64_t magic, status, output_bytes, error_bytes;
  char padding[480];
} Result;
enum { kHeaderSector = 64, kSector = 512, kAta = 0x1f0, kErrorSpace = 65536 };
#define MAGIC 0x5452415453363158

// The 512 MiB of memory: the program at its own address, and from 32 MiB on
#define PROGRAM_FILE ((char*)0x2000000)
#define INPUT ((char*)0x4000000)
#define OUTPUT ((char*)0xc000000)
#define BREAK 0x14000000
#define MAPPINGS 0x18000000
#define MAPPINGS_END 0x1f000000
#define STACK_END 0x1ffff000

extern char exception_entries[], syscall_entry[];
uint64_t program_entry;
static Header header;
static Result result;
static char errors[kErrorSpace];
static int64_t input_position;
static uint64_t current_break = BREAK, mappings_end = MAPPINGS;
static uint64_t interrupt_table[64] __attribute__((aligned(16)));

static void out8(uint16_t port, uint8_t value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static uint8_t in8(uint16_t port) {
  uint8_t value;
  __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
  return value;
}
static void write_msr(uint32_t msr, uint64_t value) {
  __asm__ volatile("wrmsr" : : "c"(msr), "a"((uint32_t)value), "d"((uint32_t)(value >> 32)));
}

// By words: the emulator takes as long for a byte.
void* memcpy(void* to, const void* from, size_t bytes) {
  void* at = to;
  size_t words = bytes / 8, rest = bytes % 8;
  __asm__ volatile("rep movsq" : "+D"(at), "+S"(from), "+c"(words) : : "memory");
  __asm__ volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(rest) : : "memory");
  return to;
}
void* memset(void* to, int value, size_t bytes) {
  void* at = to;
  size_t words = bytes / 8, rest = bytes % 8;
  const uint64_t word = (uint8_t)value * 0x0101010101010101;
  __asm__ volatile("rep stosq" : "+D"(at), "+c"(words) : "a"(word) : "memory");
  __asm__ volatile("rep stosb" : "+D"(at), "+c"(rest) : "a"(word) : "memory");
  return to;
}

// ---- disk: the first ATA drive, by programmed input and output

static void await(uint8_t mask, uint8_t state) {
  while ((in8(kAta + 7) & mask) != state) {
  }
}

static int64_t sectors_of(int64_t bytes) { return (bytes + kSector - 1) / kSector; }

static void transfer(uint64_t sector, char* data, int64_t bytes, int writing) {
  int64_t sectors = sectors_of(bytes);
  while (sectors > 0) {
    const unsigned count = sectors < 4096 ? (unsigned)sectors : 4096;
    out8(0x3f6, 2);  // no interrupts
    out8(kAta + 6, 0xe0);
    await(0x80, 0);
    out8(kAta + 2, count >> 8), out8(kAta + 3, sector >> 24), out8(kAta + 4, 0), out8(kAta + 5, 0);
    out8(kAta + 2, count), out8(kAta + 3, sector), out8(kAta + 4, sector >> 8), out8(kAta + 5, sector >> 16);
    out8(kAta + 7, writing ? 0x34 : 0x24);  // WRITE or READ SECTORS EXT
    for (unsigned i = 0; i < count; ++i) {
      size_t words = kSector / 4;
      await(0x88, 8);
      if (writing)
        __asm__ volatile("rep outsl" : "+S"(data), "+c"(words) : "d"(kAta) : "memory");
      else
        __asm__ volatile("rep insl" : "+D"(data), "+c"(words) : "d"(kAta) : "memory");
    }
    sector += count, sectors -= count;
  }
  await(0x80, 0);
}

// ---- the end

static void put_error(const char* text, int64_t bytes) {
  for (int64_t i = 0; i < bytes && result.error_bytes < kErrorSpace; ++i) errors[result.error_bytes++] = text[i];
}
static void put_text(const char* text) {
  while (*text) put_error(text++, 1);
}
static void put_number(const char* name, uint64_t value) {
  put_text(name);
  for (int shift = 60; shift >= 0; shift -= 4) put_error(&"0123456789abcdef"[value >> shift & 15], 1);
}

static __attribute__((noreturn)) void finish(int status) {
  const int64_t sector = header.output_sector + 1;
  transfer(sector, OUTPUT, result.output_bytes, 1);
  transfer(sector + sectors_of(result.output_bytes), errors, result.error_bytes, 1);
  result.magic = MAGIC, result.status = status;
  transfer(header.output_sector, (char*)&result, sizeof result, 1);
  out8(kAta + 7, 0xe7);  // flush
  await(0x80, 0);
  for (;;)
    for (const char* s = "Shutdown"; *s; ++s) out8(0x8900, *s);  // to Bochs
}

__attribute__((noreturn)) void on_exception(int vector, uint64_t first, uint64_t second) {
  uint64_t cr2;
  __asm__("mov %%cr2, %0" : "=r"(cr2));
  put_number("exception ", vector), put_number(" at ", first), put_number(" (or, with that error code, at ", second);
  put_number("), CR2 ", cr2), put_text("\n");
  finish(255);
}

// ---- system calls

enum { kBadFile = -9, kNoMemory = -12, kNoSuchCall = -38 };  // as Linux numbers errors

static int64_t put(int64_t file, const char* data, int64_t bytes) {
  if (file == 2) return put_error(data, bytes), bytes;
  if (file != 1) return kBadFile;
  if (result.output_bytes + bytes > (char*)BREAK - OUTPUT) {
    put_text("more output than the machine has room for\n");
    finish(255);
  }
  memcpy(OUTPUT + result.output_bytes, data, bytes);
  result.output_bytes += bytes;
  return bytes;
}

int64_t on_syscall(uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t number) {
  switch (number) {
    case 0: {  // read
      if (a != 0) return kBadFile;
      int64_t bytes = header.input_bytes - input_position;
      if (bytes > (int64_t)c) bytes = c;
      memcpy((char*)b, INPUT + input_position, bytes);
      input_position += bytes;
      return bytes;
    }
    case 1:  // write
      return put(a, (const char*)b, c);
    case 20: {  // writev
      int64_t total = 0;
      for (const uint64_t *part = (const uint64_t*)b, *end = part + 2 * c; part != end; part += 2)
        total += put(a, (const char*)part[0], part[1]);
      return total;
    }
    case 9: {  // mmap, of nothing but fresh memory
      const uint64_t bytes = (b + 4095) & ~4095ull, address = mappings_end;
      if (!(d & 0x20) || bytes > MAPPINGS_END - address) return kNoMemory;
      mappings_end += bytes;
      memset((char*)address, 0, bytes);
      return address;
    }
    case 10:  // mprotect
    case 11:  // munmap: that memory is not used again
      return 0;
    case 12:  // brk
      if (a < BREAK || a > MAPPINGS) return current_break;
      if (a > current_break) memset((char*)current_break, 0, a - current_break);
      return current_break = a;
    case 158:  // arch_prctl: where the program keeps what belongs to the thread
      if (a != 0x1002) return kNoSuchCall;
      write_msr(0xc0000100, b);
      return 0;
    case 60:   // exit
    case 231:  // exit_group
      finish(a & 255);
    case 234:  // tgkill: abort()
      finish(128 + c);
  }
  return kNoSuchCall;
}

// ---- the start

static void push(uint64_t** stack, uint64_t value) { *--*stack = value; }

// Loads the program and returns its stack pointer.
uint64_t machine_main(void) {
  for (int vector = 0; vector < 32; ++vector) {
    const uint64_t at = (uint64_t)exception_entries + 16 * vector;
    interrupt_table[2 * vector] = (at & 0xffff) | 8ull << 16 | 0x8e00ull << 32 | (at >> 16 & 0xffff) << 48;
  }
  struct {
    uint16_t limit;
    uint64_t base;
  } __attribute__((packed)) pointer = {sizeof interrupt_table - 1, (uint64_t)interrupt_table};
  __asm__ volatile("lidt %0" : : "m"(pointer));
  write_msr(0xc0000081, 8ull << 32);  // the code segment of system calls, their entry, and no flags to clear
  write_msr(0xc0000082, (uint64_t)syscall_entry);
  write_msr(0xc0000084, 0);

  transfer(kHeaderSector, (char*)&header, sizeof header, 0);
  transfer(kHeaderSector + 1, PROGRAM_FILE, header.program_bytes, 0);
  transfer(kHeaderSector + 1 + sectors_of(header.program_bytes), INPUT, header.input_bytes, 0);

  const Elf64_Ehdr* elf = (const Elf64_Ehdr*)PROGRAM_FILE;
  const Elf64_Phdr* segments = (const Elf64_Phdr*)(PROGRAM_FILE + elf->e_phoff);
  uint64_t headers = 0;  // where the program finds its own program headers in memory
  if (elf->e_type != ET_EXEC) put_text("expected a static program that is not position-independent\n"), finish(255);
  for (const Elf64_Phdr* s = segments; s != segments + elf->e_phnum; ++s) {
    if (s->p_type != PT_LOAD) continue;
    memset((char*)s->p_vaddr, 0, s->p_memsz);
    memcpy((char*)s->p_vaddr, PROGRAM_FILE + s->p_offset, s->p_filesz);
    if (s->p_offset <= elf->e_phoff && elf->e_phoff < s->p_offset + s->p_filesz)
      headers = s->p_vaddr + elf->e_phoff - s->p_offset;
  }
  program_entry = elf->e_entry;

  // As Linux leaves the stack: argc, argv, a null, the (empty) environment, a null, the auxiliary vector.
  char* strings = (char*)STACK_END - 1024;
  memset(strings, 0, 1024);
  memcpy(strings, "program", 8);
  memcpy(strings + 16, header.argument, sizeof header.argument);
  uint64_t* stack = (uint64_t*)strings;
  const uint64_t auxiliary[][2] = {{AT_NULL, 0},
                                   {AT_RANDOM, (uint64_t)strings + 512},
                                   {AT_PAGESZ, 4096},
                                   {AT_PHNUM, elf->e_phnum},
                                   {AT_PHENT, sizeof *segments},
                                   {AT_PHDR, headers},
                                   {AT_ENTRY, elf->e_entry},
                                   {AT_SECURE, 0}};
  push(&stack, 0);  // so that the stack ends up aligned to 16 bytes
  for (size_t i = 0; i < sizeof auxiliary / sizeof *auxiliary; ++i)
    push(&stack, auxiliary[i][1]), push(&stack, auxiliary[i][0]);
  push(&stack, 0);
  push(&stack, 0);
  push(&stack, (uint64_t)strings + 16), push(&stack, (uint64_t)strings);
  push(&stack, 2);
  return (uint64_t)stack;
}

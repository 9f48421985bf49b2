//! AMX, the matrix units of Xeon processors since Sapphire Rapids: eight tile registers of 16 x 64 bytes, and `tdpbf16ps`, 16,384
//! operations in one instruction.
//!
//! Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18; Linux `Documentation/arch/x86/xstate.rst`.

use std::arch::asm;
use std::sync::LazyLock;

use half::bf16;

use super::BLOCK;

/// `arch_prctl`, and its request for the permission to use a state of the processor.
const ARCH_PRCTL: usize = 158;
const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
/// The state that holds the tile registers.
const XTILEDATA: usize = 18;

/// Whether the processor has the units, and the kernel lets this process use them.
pub fn is_available() -> bool {
    *AVAILABLE
}

static AVAILABLE: LazyLock<bool> = LazyLock::new(|| {
    /// Bits of CPUID leaf 7, register EDX.
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    let found = std::arch::x86_64::__cpuid_count(7, 0).edx;
    found & AMX_BF16 != 0 && found & AMX_TILE != 0 && is_x86_feature_detected!("avx512f") && is_permitted()
});

/// Asks the kernel, once for all threads of the process.
fn is_permitted() -> bool {
    let refused: isize;
    // SAFETY: this request reads and writes no memory of ours; a system call changes the three registers that are named.
    unsafe {
        asm!("syscall", inlateout("rax") ARCH_PRCTL => refused, in("rdi") ARCH_REQ_XCOMP_PERM, in("rsi") XTILEDATA,
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    refused == 0
}

/// The shapes of the tile registers: all are 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_per_row: [u16; 16],
    rows: [u8; 16],
}

/// The tile registers of this thread, in use until it is dropped.
pub struct Registers(());

impl Registers {
    /// # Safety
    /// [`is_available`].
    pub unsafe fn take() -> Self {
        let mut shapes = Shapes { palette: 1, start_row: 0, reserved: [0; 14], bytes_per_row: [0; 16], rows: [0; 16] };
        shapes.bytes_per_row[..8].fill(64);
        shapes.rows[..8].fill(16);
        // SAFETY: `shapes` is the 64 bytes that the instruction reads.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const shapes, options(nostack, readonly)) };
        Self(())
    }

    /// end = begin + left right for 2 blocks of rows x 2 blocks of columns.
    ///
    /// # Safety
    /// Each operand points at `steps` tiles, at least one; the sums are good for 32 rows of 32 numbers.
    #[inline(always)]
    pub unsafe fn two_by_two(&self, left: [*const bf16; 2], right: [*const bf16; 2], steps: usize, sums: &Sums) {
        // SAFETY: all loads and stores are inside what the caller promises.
        unsafe {
            asm!(
                "mov {at}, [{sums}]",
                "mov {stride}, [{sums} + 16]",
                "tileloadd tmm0, [{at} + {stride}]",
                "tileloadd tmm1, [{at} + {stride} + 64]",
                "mov {at}, [{sums} + 8]",
                "tileloadd tmm2, [{at} + {stride}]",
                "tileloadd tmm3, [{at} + {stride} + 64]",
                "2:",
                // The left operand streams past: it must not drive the right one out of the first-level cache.
                "tileloaddt1 tmm4, [{l0} + {row}]",
                "tileloadd tmm6, [{r0} + {row}]",
                "tileloadd tmm7, [{r1} + {row}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloaddt1 tmm5, [{l1} + {row}]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {l0}, 1024",
                "add {l1}, 1024",
                "add {r0}, 1024",
                "add {r1}, 1024",
                "dec {steps}",
                "jnz 2b",
                "mov {at}, [{sums} + 24]",
                "mov {stride}, [{sums} + 40]",
                "tilestored [{at} + {stride}], tmm0",
                "tilestored [{at} + {stride} + 64], tmm1",
                "mov {at}, [{sums} + 32]",
                "tilestored [{at} + {stride}], tmm2",
                "tilestored [{at} + {stride} + 64], tmm3",
                l0 = inout(reg) left[0] => _, l1 = inout(reg) left[1] => _,
                r0 = inout(reg) right[0] => _, r1 = inout(reg) right[1] => _,
                steps = inout(reg) steps => _, row = in(reg) 64usize,
                sums = in(reg) &raw const *sums, at = out(reg) _, stride = out(reg) _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }

    /// end = begin + left right for a block of rows x 4 blocks of columns: what reads a weight from memory once for a few rows.
    ///
    /// # Safety
    /// Each operand points at `steps` tiles, at least one; the sums are good for 16 rows of 64 numbers.
    #[inline(always)]
    pub unsafe fn one_by_four(&self, left: *const bf16, right: [*const bf16; 4], steps: usize, sums: &Sums) {
        // SAFETY: all loads and stores are inside what the caller promises.
        unsafe {
            asm!(
                "mov {at}, [{sums}]",
                "mov {stride}, [{sums} + 16]",
                "tileloadd tmm0, [{at} + {stride}]",
                "tileloadd tmm1, [{at} + {stride} + 64]",
                "tileloadd tmm2, [{at} + {stride} + 128]",
                "tileloadd tmm3, [{at} + {stride} + 192]",
                "2:",
                "tileloadd tmm4, [{l} + {row}]",
                "tileloadd tmm5, [{r0} + {row}]",
                "tileloadd tmm6, [{r1} + {row}]",
                "tdpbf16ps tmm0, tmm4, tmm5",
                "tileloadd tmm7, [{r2} + {row}]",
                "tdpbf16ps tmm1, tmm4, tmm6",
                "tileloadd tmm5, [{r3} + {row}]",
                "tdpbf16ps tmm2, tmm4, tmm7",
                "tdpbf16ps tmm3, tmm4, tmm5",
                "add {l}, 1024",
                "add {r0}, 1024",
                "add {r1}, 1024",
                "add {r2}, 1024",
                "add {r3}, 1024",
                "dec {steps}",
                "jnz 2b",
                "mov {at}, [{sums} + 24]",
                "mov {stride}, [{sums} + 40]",
                "tilestored [{at} + {stride}], tmm0",
                "tilestored [{at} + {stride} + 64], tmm1",
                "tilestored [{at} + {stride} + 128], tmm2",
                "tilestored [{at} + {stride} + 192], tmm3",
                l = inout(reg) left => _,
                r0 = inout(reg) right[0] => _, r1 = inout(reg) right[1] => _,
                r2 = inout(reg) right[2] => _, r3 = inout(reg) right[3] => _,
                steps = inout(reg) steps => _, row = in(reg) 64usize,
                sums = in(reg) &raw const *sums, at = out(reg) _, stride = out(reg) _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

/// Where the sums of some blocks begin and end, in rows with `stride` bytes from one to the next; the strides may be zero.
#[repr(C)]
pub struct Sums {
    /// The first row of each block of rows.
    begin: [*const f32; 2],
    begin_stride: usize,
    end: [*mut f32; 2],
    end_stride: usize,
}

impl Sums {
    /// From places and numbers from one row to the next.
    pub fn new(begin: (*const f32, usize), end: (*mut f32, usize)) -> Self {
        Self {
            begin: [begin.0, begin.0.wrapping_add(BLOCK * begin.1)],
            begin_stride: begin.1 * size_of::<f32>(),
            end: [end.0, end.0.wrapping_add(BLOCK * end.1)],
            end_stride: end.1 * size_of::<f32>(),
        }
    }
}

impl Drop for Registers {
    fn drop(&mut self) {
        // SAFETY: it clears the registers, which nothing else uses.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

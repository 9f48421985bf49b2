//! The types of numbers in GGUF files that are written.

/// The type that a GGUF file stores matrices in. Vectors stay in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Quantization {
    /// 32 bits, as trained
    F32,
    /// 16 bits, the range up to 65,504
    F16,
    /// 16 bits, the range of f32
    Bf16,
    /// 8 bits, and a scale per 32 numbers
    #[value(name = "q8_0")]
    Q8_0,
    /// 6 bits, and scales in two levels
    #[value(name = "q6_k")]
    Q6K,
    /// 4 bits, and scales in two levels; embedding and head in q6_k
    #[value(name = "q4_k")]
    Q4K,
}

impl Quantization {
    /// As in names of files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q6K => "q6_k",
            Self::Q4K => "q4_k",
        }
    }
}

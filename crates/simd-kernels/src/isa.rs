//! The instruction set as a value: decided once at run time, carried by copy, checked at each
//! entry.

use std::fmt;
use std::str::FromStr;

/// An instruction set that this CPU has.
///
/// The constructors look before they answer, so a value that names AVX2 proves that AVX2, FMA and
/// F16C are there, and one that names VNNI proves AVX-VNNI besides, one that names AVX-512 its
/// parts F, BW, VL and VNNI. The kernels rely on that proof when they enter their
/// `#[target_feature]` functions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Isa(Kind);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Scalar,
    Portable,
    Avx2,
    Avx2Vnni,
    Avx512,
}

/// The environment variable that [`Isa::detect`] reads: `auto`, `scalar`, `portable`, `avx2`,
/// `avx2-vnni` or `avx512`.
const VARIABLE: &str = "SIMD_KERNELS_ISA";

impl Isa {
    /// Plain Rust on any CPU: the reference for every other instruction set.
    pub fn scalar() -> Isa {
        Isa(Kind::Scalar)
    }

    /// The same, but for products with float weights: these are the crate `matrixmultiply`'s, which
    /// chooses instructions by itself. The best there is without AVX2.
    pub fn portable() -> Isa {
        Isa(Kind::Portable)
    }

    /// AVX2 with FMA and F16C, or `None` when the CPU or the operating system lacks one of the
    /// three.
    pub fn avx2() -> Option<Isa> {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
        {
            return Some(Isa(Kind::Avx2));
        }
        None
    }

    /// AVX2 and AVX-VNNI, whose dot products of integers make products with Q8 and Q4 weights
    /// faster and no different; `None` when the CPU or the operating system lacks one of them.
    pub fn avx2_vnni() -> Option<Isa> {
        #[cfg(target_arch = "x86_64")]
        if Isa::avx2().is_some() && is_x86_feature_detected!("avxvnni") {
            return Some(Isa(Kind::Avx2Vnni));
        }
        None
    }

    /// AVX-512 with BW, VL and VNNI beside AVX2, for products and attention of many rows (the rest
    /// is AVX2's with the VNNI of AVX-512); `None` when the CPU or the operating system lacks one
    /// of them. The results are those of AVX2 to the last bit, except for products with Q8, whose
    /// activations are rounded to int8 instead of int16.
    pub fn avx512() -> Option<Isa> {
        #[cfg(target_arch = "x86_64")]
        if Isa::avx2().is_some()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
        {
            return Some(Isa(Kind::Avx512));
        }
        None
    }

    /// Whether it is AVX-512 and the CPU multiplies pairs of bf16 besides (AVX512-BF16), so that
    /// [`InputKind::Bf16`](crate::InputKind::Bf16) may be chosen.
    pub fn has_bf16_dot(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.has_avx512() && is_x86_feature_detected!("avx512bf16");
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// This instruction set without AVX-512: the yardstick of machines that have it next to those
    /// that have not.
    pub fn without_avx512(self) -> Isa {
        match self.0 {
            Kind::Avx512 => {
                Isa::avx2_vnni().or(Isa::avx2()).expect("AVX-512 was found beside AVX2")
            }
            _ => self,
        }
    }

    /// All instruction sets of this CPU, the reference first and the best last.
    pub fn all() -> impl Iterator<Item = Isa> {
        [Some(Isa::scalar()), Some(Isa::portable()), Isa::avx2(), Isa::avx2_vnni(), Isa::avx512()]
            .into_iter()
            .flatten()
    }

    /// The best instruction set here, or the one that the environment variable `SIMD_KERNELS_ISA`
    /// names (`auto`, `scalar`, `portable`, `avx2`, `avx2-vnni` or `avx512`).
    ///
    /// # Panics
    /// When the variable names an instruction set that is unknown or missing here;
    /// [`Isa::from_env`] returns that as an error. Falling back silently would make a benchmark of
    /// the wrong kernels look like a slow machine.
    pub fn detect() -> Isa {
        Isa::from_env().unwrap_or_else(|error| panic!("{VARIABLE}: {error}"))
    }

    /// As [`Isa::detect`], with an error in place of the panic.
    ///
    /// # Errors
    /// [`IsaError`] when `SIMD_KERNELS_ISA` is set to something this CPU cannot do or nobody knows.
    pub fn from_env() -> Result<Isa, IsaError> {
        match std::env::var_os(VARIABLE) {
            None => "auto".parse(),
            Some(value) => value.to_string_lossy().parse(),
        }
    }

    /// `"scalar"`, `"portable"`, `"avx2"`, `"avx2-vnni"` or `"avx512"`.
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Scalar => "scalar",
            Kind::Portable => "portable",
            Kind::Avx2 => "avx2",
            Kind::Avx2Vnni => "avx2-vnni",
            Kind::Avx512 => "avx512",
        }
    }

    /// Whether it is AVX2 or more, so that the AVX2 functions may be entered.
    pub fn has_avx2(self) -> bool {
        matches!(self.0, Kind::Avx2 | Kind::Avx2Vnni | Kind::Avx512)
    }

    /// Whether the scalar functions leave large products to `matrixmultiply`.
    pub(crate) fn has_matrixmultiply(self) -> bool {
        self.0 == Kind::Portable
    }

    /// No dot products of integers beyond AVX2's: one of the values of [`vnni`](Self::vnni),
    /// numbers so that they can be constant parameters.
    pub(crate) const PLAIN: u8 = 0;
    /// Those of AVX-VNNI.
    pub(crate) const AVX_VNNI: u8 = 1;
    /// The same instructions for the same registers, in the encoding of AVX-512.
    pub(crate) const AVX512_VNNI: u8 = 2;

    /// Which dot products of integers the AVX2 functions may use.
    pub(crate) fn vnni(self) -> u8 {
        match self.0 {
            Kind::Avx512 => Isa::AVX512_VNNI,
            Kind::Avx2Vnni => Isa::AVX_VNNI,
            _ => Isa::PLAIN,
        }
    }

    /// Whether the functions for AVX-512 may be entered.
    pub(crate) fn has_avx512(self) -> bool {
        matches!(self.0, Kind::Avx512)
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Isa {
    type Err = IsaError;

    /// `auto` (the best one here), `scalar`, `portable`, `avx2`, `avx2-vnni` or `avx512`.
    fn from_str(name: &str) -> Result<Isa, IsaError> {
        match name {
            "auto" => Ok(Isa::all().last().unwrap_or(Isa::portable())),
            "scalar" => Ok(Isa::scalar()),
            "portable" => Ok(Isa::portable()),
            "avx2" => Isa::avx2().ok_or(IsaError::Missing { name: "avx2" }),
            "avx2-vnni" => Isa::avx2_vnni().ok_or(IsaError::Missing { name: "avx2-vnni" }),
            "avx512" => Isa::avx512().ok_or(IsaError::Missing { name: "avx512" }),
            other => Err(IsaError::Unknown { name: other.to_owned() }),
        }
    }
}

/// Why a name does not give an [`Isa`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum IsaError {
    /// No instruction set has this name.
    Unknown {
        /// The name as given.
        name: String,
    },
    /// The kernels exist, but this CPU cannot run them.
    Missing {
        /// The instruction set asked for.
        name: &'static str,
    },
}

impl fmt::Display for IsaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            IsaError::Unknown { name } => {
                write!(
                    f,
                    "unknown instruction set {name:?}, expected auto, scalar, portable, avx2, avx2-vnni or avx512"
                )
            }
            IsaError::Missing { name } => {
                write!(
                    f,
                    "this CPU does not have {name} (AVX2 with FMA and F16C, VNNI as AVX-VNNI, AVX-512 with F, BW, VL and VNNI)"
                )
            }
        }
    }
}

impl std::error::Error for IsaError {}

/// Calls the AVX2 function when `isa` proves it may run, else the scalar one, both with the same
/// arguments: `dispatch!(isa, avx2::dot, scalar::dot, (a, b))`; `avx2: (c)` and `scalar: (d)` at
/// the end are for one of them alone. The AVX2 function's path is compiled on x86-64 only.
///
/// A macro because no generic function can call a `#[target_feature]` function, which implements no
/// `Fn` trait.
macro_rules! dispatch {
    ($isa:expr, $avx2:path, $scalar:path, ($($arg:expr),* $(,)?) $(, avx2: ($($more:expr),*))? $(, scalar: ($($plain:expr),*))?) => {{
        #[cfg(target_arch = "x86_64")]
        if $isa.has_avx2() {
            #[cfg(test)]
            $crate::isa::witness::record(stringify!($avx2));
            // SAFETY: the target features of the callee are AVX2, FMA and F16C; a value of `Isa`
            // that says AVX2 is only made after `Isa::avx2` has found all three.
            #[allow(unused_unsafe)]
            return unsafe { $avx2($($arg),* $(, $($more),*)?) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = $isa;
        $scalar($($arg),* $(, $($plain),*)?)
    }};
}
pub(crate) use dispatch;

/// Which AVX2 functions the tests of this thread have entered, so that a silently skipped path
/// fails a test.
#[cfg(test)]
pub(crate) mod witness {
    use std::cell::RefCell;
    use std::collections::HashSet;

    thread_local!(static ENTERED: RefCell<HashSet<&'static str>> = RefCell::default());

    /// Notes that the AVX2 function `name` was entered.
    pub(crate) fn record(name: &'static str) {
        ENTERED.with_borrow_mut(|set| set.insert(name));
    }

    /// Fails when the CPU has AVX2 and this thread has not entered the AVX2 function `name` (as
    /// written in `dispatch!`).
    pub(crate) fn assert_entered(name: &str) {
        assert_entered_with(super::Isa::avx2(), "AVX2", name);
    }

    /// Fails when the CPU has AVX-512 and this thread has not entered the function `name` for it.
    pub(crate) fn assert_entered_avx512(name: &str) {
        assert_entered_with(super::Isa::avx512(), "AVX-512", name);
    }

    fn assert_entered_with(isa: Option<super::Isa>, features: &str, name: &str) {
        let entered =
            ENTERED.with_borrow(|set| set.iter().any(|path| path.replace(' ', "") == name));
        assert!(entered || isa.is_none(), "the CPU has {features}, but {name} was not exercised");
        if isa.is_none() {
            eprintln!("not tested: {name}, this CPU has no {features}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for (name, isa) in [("scalar", Isa::scalar()), ("portable", Isa::portable())] {
            assert_eq!((name.parse(), isa.name(), isa.has_avx2()), (Ok(isa), name, false));
        }
        let best: Isa = "auto".parse().expect("auto always works");
        assert!(Isa::avx512().is_none_or(|isa| isa.vnni() == Isa::AVX512_VNNI));
        assert_eq!(
            Some(best),
            Isa::avx512().or(Isa::avx2_vnni()).or(Isa::avx2()).or(Some(Isa::portable()))
        );
        for (name, isa) in
            [("avx2", Isa::avx2()), ("avx2-vnni", Isa::avx2_vnni()), ("avx512", Isa::avx512())]
        {
            assert_eq!(name.parse(), isa.ok_or(IsaError::Missing { name }));
            assert!(isa.is_none_or(|isa| isa.name() == name && isa.has_avx2()));
        }
    }

    #[test]
    fn without_avx512_there_is_the_best_of_avx2() {
        for isa in Isa::all() {
            let narrow = isa.without_avx512();
            let best = Isa::avx2_vnni().or(Isa::avx2());
            assert_eq!(Some(narrow), if Some(isa) == Isa::avx512() { best } else { Some(isa) });
        }
    }

    #[test]
    fn unknown_names_are_errors() {
        let error = "sse4".parse::<Isa>().expect_err("not an instruction set of this crate");
        assert_eq!(
            error.to_string(),
            "unknown instruction set \"sse4\", expected auto, scalar, portable, avx2, avx2-vnni or avx512"
        );
    }
}

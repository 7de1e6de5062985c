//! The instruction set as a value: decided once at run time, carried by copy, checked at each entry.

use std::fmt;
use std::str::FromStr;

/// An instruction set that this CPU has.
///
/// The constructors look before they answer, so a value that names AVX2 proves that AVX2, FMA and F16C are there.
/// The kernels rely on that proof when they enter their `#[target_feature]` functions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Isa(Kind);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Scalar,
    Avx2,
}

/// The environment variable that [`Isa::detect`] reads: `auto`, `scalar` or `avx2`.
const VARIABLE: &str = "SIMD_KERNELS_ISA";

impl Isa {
    /// Plain Rust on any CPU: the reference for every other instruction set.
    pub fn scalar() -> Isa {
        Isa(Kind::Scalar)
    }

    /// AVX2 with FMA and F16C, or `None` when the CPU or the operating system lacks one of the three.
    pub fn avx2() -> Option<Isa> {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
            return Some(Isa(Kind::Avx2));
        }
        None
    }

    /// The best instruction set here, or the one that the environment variable `SIMD_KERNELS_ISA` names
    /// (`auto`, `scalar` or `avx2`).
    ///
    /// # Panics
    /// When the variable names an instruction set that is unknown or missing here; [`Isa::from_env`] returns that
    /// as an error. Falling back silently would make a benchmark of the wrong kernels look like a slow machine.
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

    /// `"scalar"` or `"avx2"`.
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Scalar => "scalar",
            Kind::Avx2 => "avx2",
        }
    }

    /// Whether the AVX2 functions may be entered.
    pub(crate) fn is_avx2(self) -> bool {
        self.0 == Kind::Avx2
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Isa {
    type Err = IsaError;

    /// `auto` (the best one here), `scalar` or `avx2`.
    fn from_str(name: &str) -> Result<Isa, IsaError> {
        match name {
            "auto" => Ok(Isa::avx2().unwrap_or(Isa::scalar())),
            "scalar" => Ok(Isa::scalar()),
            "avx2" => Isa::avx2().ok_or(IsaError::Missing { name: "avx2" }),
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
            IsaError::Unknown { name } => write!(f, "unknown instruction set {name:?}, expected auto, scalar or avx2"),
            IsaError::Missing { name } => {
                write!(f, "this CPU does not have {name} (with FMA and F16C)")
            }
        }
    }
}

impl std::error::Error for IsaError {}

/// Calls the AVX2 function when `isa` proves it may run, else the scalar one, both with the same arguments:
/// `dispatch!(isa, avx2::dot, scalar::dot, (a, b))`. The AVX2 path is compiled on x86-64 only.
///
/// A macro because no generic function can call a `#[target_feature]` function, which implements no `Fn` trait.
macro_rules! dispatch {
    ($isa:expr, $avx2:path, $scalar:path, ($($arg:expr),* $(,)?)) => {{
        #[cfg(target_arch = "x86_64")]
        if $isa.is_avx2() {
            #[cfg(test)]
            $crate::isa::witness::record(stringify!($avx2));
            // SAFETY: the target features of the callee are AVX2, FMA and F16C; a value of `Isa` that says AVX2
            // is only made by `Isa::avx2` after it has found all three.
            #[allow(unused_unsafe)]
            return unsafe { $avx2($($arg),*) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = $isa;
        $scalar($($arg),*)
    }};
}
pub(crate) use dispatch;

/// Which AVX2 functions the tests of this thread have entered, so that a silently skipped path fails a test.
#[cfg(test)]
pub(crate) mod witness {
    use std::cell::RefCell;
    use std::collections::HashSet;

    thread_local!(static ENTERED: RefCell<HashSet<&'static str>> = RefCell::default());

    /// Notes that the AVX2 function `name` was entered.
    pub(crate) fn record(name: &'static str) {
        ENTERED.with_borrow_mut(|set| set.insert(name));
    }

    /// Fails when the CPU has AVX2 and this thread has not entered the AVX2 function `name` (as written in `dispatch!`).
    pub(crate) fn assert_entered(name: &str) {
        let entered = ENTERED.with_borrow(|set| set.iter().any(|path| path.replace(' ', "") == name));
        assert!(entered || super::Isa::avx2().is_none(), "the CPU has AVX2, but {name} was not exercised");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        assert_eq!("scalar".parse(), Ok(Isa::scalar()));
        assert_eq!("scalar".parse::<Isa>().map(Isa::name), Ok("scalar"));
        let best: Isa = "auto".parse().expect("auto always works");
        match Isa::avx2() {
            Some(isa) => assert_eq!((best, isa.name()), (isa, "avx2")),
            None => assert_eq!("avx2".parse::<Isa>(), Err(IsaError::Missing { name: "avx2" })),
        }
    }

    #[test]
    fn unknown_names_are_errors() {
        let error = "avx512".parse::<Isa>().expect_err("not an instruction set of this crate");
        assert_eq!(error.to_string(), "unknown instruction set \"avx512\", expected auto, scalar or avx2");
    }
}

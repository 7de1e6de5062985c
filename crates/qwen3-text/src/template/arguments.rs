//! Arguments of Python's functions and methods, given by position or by name.

use std::fmt::Display;

use minijinja::value::{Kwargs, Rest};
use minijinja::{Error, ErrorKind, Value};

/// The arguments of a call in the order of the parameters' names; `None` where one is not given.
pub(super) struct Bound<const N: usize>(pub [Option<Value>; N]);

impl<const N: usize> Bound<N> {
    /// Assigns the arguments of `function` to its parameters `names`.
    pub(super) fn new(
        function: &str,
        arguments: &[Value],
        names: [&str; N],
    ) -> Result<Self, Error> {
        let mut bound = [const { None }; N];
        let mut count = 0;
        for argument in arguments {
            if argument.is_kwargs() {
                let named = Kwargs::try_from(argument.clone())?;
                for name in named.args() {
                    let Some(at) = names.iter().position(|known| *known == name) else {
                        return Err(refused(format!("{function}: unknown argument {name:?}")));
                    };
                    bound[at] = Some(named.peek(name)?);
                }
            } else if count < N {
                bound[count] = Some(argument.clone());
                count += 1;
            } else {
                let message = format!("{function}: more than {N} arguments");
                return Err(Error::new(ErrorKind::TooManyArguments, message));
            }
        }
        Ok(Self(bound))
    }
}

/// The arguments of a filter, by position and by name, as those of a method.
pub(super) fn all(arguments: Rest<Value>, named: Kwargs) -> Vec<Value> {
    arguments.iter().cloned().chain([Value::from(named)]).collect()
}

/// An integer argument. A float is refused, as in Python.
pub(super) fn integer(function: &str, name: &str, value: &Value) -> Result<i64, Error> {
    let wrong = || refused(format!("{function}: {name}: expected an integer"));
    if value.is_integer() || value.kind() == minijinja::value::ValueKind::Bool {
        i64::try_from(value.clone()).map_err(|_| wrong())
    } else {
        Err(wrong())
    }
}

/// An operation that the template may not do.
pub(super) fn refused(message: impl Display) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.to_string())
}

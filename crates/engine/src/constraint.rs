//! Rules about which tokens may follow: grammars, and budgets for thinking.

/// What a constraint allows at the next place.
#[derive(Debug, PartialEq, Eq)]
pub enum Next<'a> {
    /// Any token.
    Any,
    /// The tokens whose bit is set: bit `id % 32` of word `id / 32`. Missing words count as zero.
    Mask(&'a [u32]),
    /// This token; it is not sampled.
    Forced(u32),
    /// No further token: the sequence ends.
    Stop,
}

/// Why a constraint cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the constraint failed after token {token:?}: {reason}")]
pub struct ConstraintError {
    /// The token it was given last, if any.
    pub token: Option<u32>,
    /// What happened.
    pub reason: String,
}

/// Decides which tokens one sequence may take. It lives on rank 0 and is used by the engine's
/// thread alone.
///
/// The engine calls `next` once before each token and `accept` with each token that was chosen,
/// also with forced ones. It calls `next` while the ranks compute the forward pass.
pub trait TokenConstraint: Send {
    /// What may come next.
    fn next(&mut self) -> Result<Next<'_>, ConstraintError>;

    /// Takes the token that was chosen.
    fn accept(&mut self, token: u32) -> Result<(), ConstraintError>;
}

/// Limits thinking to a number of tokens: after `budget` tokens without an end of thinking, the
/// tokens of that end are forced. After thinking, another constraint decides.
pub struct ThinkingBudget {
    remaining: usize,
    end: Vec<u32>,
    /// Length of the longest beginning of `end` with which the tokens so far end.
    matched: usize,
    thinking: bool,
    inner: Option<Box<dyn TokenConstraint>>,
}

impl ThinkingBudget {
    /// Allows `budget` tokens until the token sequence `end` (usually `</think>`), which the model
    /// may also choose itself. From then on `inner` decides, and sees only the tokens after `end`.
    /// With an empty `end` there is no thinking.
    pub fn new(budget: usize, end: Vec<u32>, inner: Option<Box<dyn TokenConstraint>>) -> Self {
        let thinking = !end.is_empty();
        Self { remaining: budget, end, matched: 0, thinking, inner }
    }

    /// The longest beginning of `end` with which `end[..matched]` and then `token` finish.
    fn advance(&self, token: u32) -> usize {
        let mut recent = self.end[..self.matched].to_vec();
        recent.push(token);
        let fits = |length: &usize| recent.ends_with(&self.end[..*length]);
        (0..=recent.len().min(self.end.len())).rev().find(fits).unwrap_or(0)
    }
}

impl TokenConstraint for ThinkingBudget {
    fn next(&mut self) -> Result<Next<'_>, ConstraintError> {
        if !self.thinking {
            return self.inner.as_mut().map_or(Ok(Next::Any), |inner| inner.next());
        }
        Ok(if self.remaining == 0 { Next::Forced(self.end[self.matched]) } else { Next::Any })
    }

    fn accept(&mut self, token: u32) -> Result<(), ConstraintError> {
        if !self.thinking {
            return self.inner.as_mut().map_or(Ok(()), |inner| inner.accept(token));
        }
        self.remaining = self.remaining.saturating_sub(1);
        self.matched = self.advance(token);
        self.thinking = self.matched < self.end.len();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Allows each token once; stops after two.
    struct TwoTokens(Vec<u32>);

    impl TokenConstraint for TwoTokens {
        fn next(&mut self) -> Result<Next<'_>, ConstraintError> {
            Ok(if self.0.len() == 2 { Next::Stop } else { Next::Mask(&[0b1000]) })
        }

        fn accept(&mut self, token: u32) -> Result<(), ConstraintError> {
            self.0.push(token);
            Ok(())
        }
    }

    fn budget(budget: usize) -> ThinkingBudget {
        ThinkingBudget::new(budget, vec![7, 7, 8], Some(Box::new(TwoTokens(Vec::new()))))
    }

    fn accept(constraint: &mut ThinkingBudget, tokens: &[u32]) {
        for &token in tokens {
            constraint.accept(token).expect("no constraint fails");
        }
    }

    #[test]
    fn the_end_of_thinking_is_forced_when_the_budget_is_used_up() {
        let mut constraint = budget(3);
        for token in [1, 2, 7] {
            assert_eq!(constraint.next(), Ok(Next::Any));
            accept(&mut constraint, &[token]);
        }
        // One token of the end is there already.
        for token in [7, 8] {
            assert_eq!(constraint.next(), Ok(Next::Forced(token)));
            accept(&mut constraint, &[token]);
        }
        assert_eq!(constraint.next(), Ok(Next::Mask(&[0b1000])));
        accept(&mut constraint, &[3, 3]);
        assert_eq!(constraint.next(), Ok(Next::Stop));
    }

    #[test]
    fn the_model_may_end_thinking_itself() {
        let mut constraint = budget(100);
        // 7 7 7 8 contains the end, although the first 7 is not a part of it.
        accept(&mut constraint, &[5, 7, 7, 7, 8]);
        assert_eq!(constraint.next(), Ok(Next::Mask(&[0b1000])));
        let mut none = ThinkingBudget::new(0, Vec::new(), None);
        assert_eq!(none.next(), Ok(Next::Any));
        let mut at_once = ThinkingBudget::new(0, vec![9], None);
        assert_eq!(at_once.next(), Ok(Next::Forced(9)));
        accept(&mut at_once, &[9]);
        assert_eq!(at_once.next(), Ok(Next::Any));
    }
}

//! The place of thinking in an answer: how long it may take, and that rules about the answer hold
//! only after it.

use engine::{ConstraintError, Next, TokenConstraint};
use qwen3_text::Tokenizer;

/// Lets the model think, at most for a number of tokens, and then leaves the choice to a rule for
/// the answer itself.
pub struct ThinkingGate {
    /// The token that begins thinking.
    begin: Option<u32>,
    /// The tokens that end it.
    end: Vec<u32>,
    state: State,
    /// Tokens of thinking that are left.
    left: Option<usize>,
    /// How many tokens of `end` the latest tokens are.
    matched: usize,
    inner: Option<Box<dyn TokenConstraint>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing was chosen yet; the model may begin to think.
    Start,
    Thinking,
    Answer,
}

impl ThinkingGate {
    /// A gate for a model that thinks between `<think>` and `</think>`. `in_thinking` says that the
    /// prompt has begun the thinking. With `inner` and without that, the model has to begin it.
    pub fn new(
        tokenizer: &Tokenizer,
        in_thinking: bool,
        budget: Option<usize>,
        inner: Option<Box<dyn TokenConstraint>>,
    ) -> Self {
        let end = tokenizer.added_token("</think>").map_or_else(
            || tokenizer.encode_rendered("</think>").unwrap_or_default(),
            |end| vec![end],
        );
        Self::with_tokens(tokenizer.added_token("<think>"), end, in_thinking, budget, inner)
    }

    fn with_tokens(
        begin: Option<u32>,
        end: Vec<u32>,
        in_thinking: bool,
        budget: Option<usize>,
        inner: Option<Box<dyn TokenConstraint>>,
    ) -> Self {
        let state = match (in_thinking, begin) {
            _ if end.is_empty() => State::Answer,
            (true, _) => State::Thinking,
            (false, Some(_)) => State::Start,
            (false, None) => State::Answer,
        };
        Self { begin, end, state, left: budget, matched: 0, inner }
    }
}

impl TokenConstraint for ThinkingGate {
    fn next(&mut self) -> Result<Next<'_>, ConstraintError> {
        match (self.state, self.begin) {
            (State::Start, Some(begin)) if self.inner.is_some() => Ok(Next::Forced(begin)),
            (State::Start, _) => Ok(Next::Any),
            (State::Thinking, _) if self.left == Some(0) => {
                Ok(Next::Forced(self.end[self.matched]))
            }
            (State::Thinking, _) => Ok(Next::Any),
            (State::Answer, _) => self.inner.as_mut().map_or(Ok(Next::Any), |inner| inner.next()),
        }
    }

    fn accept(&mut self, token: u32) -> Result<(), ConstraintError> {
        match self.state {
            State::Start if Some(token) == self.begin => self.state = State::Thinking,
            State::Start => self.state = State::Answer,
            State::Thinking => {
                self.left = self.left.map(|left| left.saturating_sub(1));
                // `</think>` is one token, or a few that do not repeat.
                self.matched = match token {
                    token if token == self.end[self.matched] => self.matched + 1,
                    token if token == self.end[0] => 1,
                    _ => 0,
                };
                if self.matched == self.end.len() {
                    self.state = State::Answer;
                }
            }
            State::Answer => {
                return self.inner.as_mut().map_or(Ok(()), |inner| inner.accept(token));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Only(u32);

    impl TokenConstraint for Only {
        fn next(&mut self) -> Result<Next<'_>, ConstraintError> {
            Ok(Next::Forced(self.0))
        }

        fn accept(&mut self, token: u32) -> Result<(), ConstraintError> {
            let reason = "another token".to_owned();
            if token == self.0 {
                Ok(())
            } else {
                Err(ConstraintError { token: Some(token), reason })
            }
        }
    }

    /// `<think>` is 1, `</think>` is 2.
    fn gate(in_thinking: bool, budget: Option<usize>, inner: Option<u32>) -> ThinkingGate {
        let inner = inner.map(|token| Box::new(Only(token)) as Box<dyn TokenConstraint>);
        ThinkingGate::with_tokens(Some(1), vec![2], in_thinking, budget, inner)
    }

    fn accept(gate: &mut ThinkingGate, tokens: &[u32]) {
        tokens.iter().for_each(|token| gate.accept(*token).unwrap());
    }

    #[test]
    fn thinking_ends_when_its_tokens_are_used_up() {
        for in_thinking in [true, false] {
            let mut gate = gate(in_thinking, Some(2), None);
            if !in_thinking {
                assert_eq!(gate.next(), Ok(Next::Any));
                accept(&mut gate, &[1]);
            }
            accept(&mut gate, &[7]);
            assert_eq!(gate.next(), Ok(Next::Any));
            accept(&mut gate, &[7]);
            assert_eq!(gate.next(), Ok(Next::Forced(2)));
            accept(&mut gate, &[2]);
            assert_eq!(gate.next(), Ok(Next::Any));
        }
    }

    #[test]
    fn an_answer_without_thinking_is_not_cut_by_the_budget() {
        let mut gate = gate(false, Some(1), None);
        accept(&mut gate, &[7, 7, 7, 7]);
        assert_eq!(gate.next(), Ok(Next::Any));
    }

    #[test]
    fn rules_hold_only_after_thinking() {
        let mut gate = gate(false, None, Some(9));
        assert_eq!(gate.next(), Ok(Next::Forced(1)));
        accept(&mut gate, &[1, 7, 1, 7]);
        assert_eq!(gate.next(), Ok(Next::Any));
        accept(&mut gate, &[2]);
        assert_eq!(gate.next(), Ok(Next::Forced(9)));
        assert!(gate.accept(7).is_err());
    }
}

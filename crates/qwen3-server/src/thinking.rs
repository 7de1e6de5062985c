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
    /// What stands between the thinking and an answer that follows a rule.
    gap: Vec<u32>,
    /// The rule's mask with `begin`.
    mask: Vec<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing was chosen yet; the model may begin to think.
    Start,
    Thinking,
    /// After so many tokens of the gap.
    Gap(usize),
    Answer,
}

impl ThinkingGate {
    /// A gate for a model that thinks between `<think>` and `</think>`. `in_thinking` says that the
    /// prompt has begun the thinking; without that, the model may begin it. `inner` decides about
    /// the answer, from its first token on or from the end of the thinking.
    pub fn new(
        tokenizer: &Tokenizer,
        in_thinking: bool,
        budget: Option<usize>,
        inner: Option<Box<dyn TokenConstraint>>,
    ) -> Self {
        let encode = |text: &str| tokenizer.encode_rendered(text).unwrap_or_default();
        let end =
            tokenizer.added_token("</think>").map_or_else(|| encode("</think>"), |id| vec![id]);
        let gap = if inner.is_some() { encode("\n\n") } else { Vec::new() };
        let begin = tokenizer.added_token("<think>");
        let tokens = Tokens { begin, end, gap };
        Self::with_tokens(tokens, in_thinking, budget, inner)
    }

    fn with_tokens(
        Tokens { begin, end, gap }: Tokens,
        in_thinking: bool,
        left: Option<usize>,
        inner: Option<Box<dyn TokenConstraint>>,
    ) -> Self {
        let state = match (in_thinking, begin) {
            _ if end.is_empty() => State::Answer,
            (true, _) => State::Thinking,
            (false, Some(_)) => State::Start,
            (false, None) => State::Answer,
        };
        Self { begin, end, state, left, matched: 0, inner, gap, mask: Vec::new() }
    }

    /// What the rule allows, or the beginning of thinking.
    fn first(&mut self, begin: u32) -> Result<Next<'_>, ConstraintError> {
        let Some(inner) = &mut self.inner else { return Ok(Next::Any) };
        self.mask.clear();
        match inner.next()? {
            Next::Any => return Ok(Next::Any),
            Next::Mask(words) => self.mask.extend_from_slice(words),
            Next::Forced(id) => set(&mut self.mask, id),
            Next::Stop => {}
        }
        set(&mut self.mask, begin);
        Ok(Next::Mask(&self.mask))
    }
}

/// The tokens around thinking.
struct Tokens {
    begin: Option<u32>,
    end: Vec<u32>,
    gap: Vec<u32>,
}

/// Sets the bit of an id, in as many words as that needs.
fn set(mask: &mut Vec<u32>, id: u32) {
    let word = id as usize / 32;
    if mask.len() <= word {
        mask.resize(word + 1, 0);
    }
    mask[word] |= 1 << (id % 32);
}

impl TokenConstraint for ThinkingGate {
    fn next(&mut self) -> Result<Next<'_>, ConstraintError> {
        match (self.state, self.begin) {
            (State::Start, Some(begin)) => self.first(begin),
            (State::Start, None) => Ok(Next::Any),
            (State::Thinking, _) if self.left == Some(0) => {
                Ok(Next::Forced(self.end[self.matched]))
            }
            (State::Thinking, _) => Ok(Next::Any),
            (State::Gap(at), _) => Ok(Next::Forced(self.gap[at])),
            (State::Answer, _) => self.inner.as_mut().map_or(Ok(Next::Any), |inner| inner.next()),
        }
    }

    fn accept(&mut self, token: u32) -> Result<(), ConstraintError> {
        match self.state {
            State::Start if Some(token) == self.begin => self.state = State::Thinking,
            State::Start => {
                self.state = State::Answer;
                return self.accept(token);
            }
            State::Thinking => {
                self.left = self.left.map(|left| left.saturating_sub(1));
                // `</think>` is one token, or a few that do not repeat.
                self.matched = match token {
                    token if token == self.end[self.matched] => self.matched + 1,
                    token if token == self.end[0] => 1,
                    _ => 0,
                };
                if self.matched == self.end.len() {
                    self.state = if self.gap.is_empty() { State::Answer } else { State::Gap(0) };
                }
            }
            State::Gap(at) if at + 1 < self.gap.len() => self.state = State::Gap(at + 1),
            State::Gap(_) => self.state = State::Answer,
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
        let gap = if inner.is_some() { vec![3] } else { Vec::new() };
        let tokens = Tokens { begin: Some(1), end: vec![2], gap };
        ThinkingGate::with_tokens(tokens, in_thinking, budget, inner)
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
        // The answer may begin, or the thinking.
        assert_eq!(gate.next(), Ok(Next::Mask(&[1 << 9 | 1 << 1])));
        accept(&mut gate, &[1, 7, 1, 7]);
        assert_eq!(gate.next(), Ok(Next::Any));
        accept(&mut gate, &[2]);
        assert_eq!(gate.next(), Ok(Next::Forced(3)));
        accept(&mut gate, &[3]);
        assert_eq!(gate.next(), Ok(Next::Forced(9)));
        assert!(gate.accept(7).is_err());
    }

    #[test]
    fn rules_hold_at_once_for_a_model_that_does_not_think() {
        let mut at_start = gate(false, None, Some(9));
        assert!(at_start.accept(7).is_err());
        let mut at_start = gate(false, Some(0), Some(9));
        accept(&mut at_start, &[9]);
        assert_eq!(at_start.next(), Ok(Next::Forced(9)));
    }

    #[test]
    fn a_budget_ends_thinking_before_rules() {
        let mut gate = gate(true, Some(1), Some(9));
        accept(&mut gate, &[7]);
        for token in [2, 3, 9] {
            assert_eq!(gate.next(), Ok(Next::Forced(token)));
            accept(&mut gate, &[token]);
        }
    }
}

//! Text of tokens as they come.

use crate::tokens::{Result, Tokenizer};

/// Turns tokens into text one by one. What a token says may depend on the one before it, and a character may take
/// several tokens: text is given out when it can no longer change, so that the pieces put together are the text of all
/// tokens.
#[derive(Debug)]
pub struct Detokeniser<'t> {
    tokenizer: &'t Tokenizer,
    /// Some tokens whose text is out, for context, then those whose text is not, or in part.
    ids: Vec<u32>,
    /// Number of the former.
    done: usize,
    /// Bytes that are out of the text of the latter.
    given: usize,
}

/// What the tokeniser writes for the bytes of a character that is not complete.
const INCOMPLETE: char = '\u{fffd}';

impl<'t> Detokeniser<'t> {
    /// Tokens of the prompt that decide how the first new one is written, and how many more where these begin within a
    /// character.
    const CONTEXT: usize = 8;

    /// For the tokens behind `prompt`.
    ///
    /// # Errors
    /// What the tokeniser says.
    pub fn new(tokenizer: &'t Tokenizer, prompt: &[u32]) -> Result<Self> {
        let mut ids = prompt;
        for length in Self::CONTEXT..2 * Self::CONTEXT {
            ids = &prompt[prompt.len().saturating_sub(length)..];
            if !tokenizer.decode(ids)?.starts_with(INCOMPLETE) {
                break;
            }
        }
        let mut detokeniser = Detokeniser { tokenizer, ids: ids.to_vec(), done: ids.len(), given: 0 };
        // A prompt may end within a character, which the tokens to come complete.
        while tokenizer.decode(&ids[..detokeniser.done])?.ends_with(INCOMPLETE) {
            detokeniser.done -= 1;
        }
        detokeniser.given = detokeniser.pending()?.trim_end_matches(INCOMPLETE).len();
        Ok(detokeniser)
    }

    /// Takes a token; the text that is certain now, often empty.
    ///
    /// # Errors
    /// What the tokeniser says.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.pending()?;
        let certain = text.trim_end_matches(INCOMPLETE);
        let new = certain.get(self.given..).unwrap_or_default().to_string();
        if certain.len() < text.len() {
            self.given += new.len();
        } else if !text.is_empty() {
            self.ids.drain(..self.done);
            (self.done, self.given) = (self.ids.len(), 0);
        }
        Ok(new)
    }

    /// What is left when there are no more tokens; a character that was begun becomes the replacement character.
    ///
    /// # Errors
    /// What the tokeniser says.
    pub fn finish(self) -> Result<String> {
        Ok(self.pending()?.get(self.given..).unwrap_or_default().to_string())
    }

    /// Text of the tokens whose text is not all out.
    fn pending(&self) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[..self.done])?.len();
        let text = self.tokenizer.decode(&self.ids)?;
        Ok(text.get(before..).unwrap_or_default().to_string())
    }
}

//! Edits numbers of a `config.json` in place. Everything else stays byte for byte: tools disagree about configs that
//! were parsed and written anew.

/// Replaces the number at top-level key `key` by `value`. `None` where the key is absent or holds no number.
pub(super) fn set_number(text: &str, key: &str, value: usize) -> Option<String> {
    let bytes = text.as_bytes();
    let quoted = format!("\"{key}\"");
    let (mut depth, mut at) = (0usize, 0usize);
    while at < bytes.len() {
        match bytes[at] {
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth = depth.checked_sub(1)?,
            b'"' => {
                let end = string_end(bytes, at)?;
                if depth == 1 && text[at..end] == quoted {
                    let colon = skip_space(bytes, end);
                    if bytes.get(colon) == Some(&b':') {
                        let start = skip_space(bytes, colon + 1);
                        let digits =
                            bytes[start..].iter().take_while(|b| matches!(b, b'0'..=b'9' | b'.')).count();
                        let found = (digits > 0).then(|| (&text[..start], &text[start + digits..]))?;
                        return Some(format!("{}{value}{}", found.0, found.1));
                    }
                }
                at = end;
                continue;
            }
            _ => {}
        }
        at += 1;
    }
    None
}

/// Index behind the string that begins at `start`.
fn string_end(bytes: &[u8], start: usize) -> Option<usize> {
    let mut at = start + 1;
    loop {
        match bytes.get(at)? {
            b'\\' => at += 2,
            b'"' => return Some(at + 1),
            _ => at += 1,
        }
    }
}

fn skip_space(bytes: &[u8], mut at: usize) -> usize {
    while bytes.get(at).is_some_and(u8::is_ascii_whitespace) {
        at += 1;
    }
    at
}

#[cfg(test)]
mod tests {
    use super::set_number;

    #[test]
    fn only_the_number_at_the_top_level_changes() {
        let text = "{\"a\": {\"n\": 1}, \"s\": \"\\\"n\\\": 5\",\n  \"n\" : 64,\t\"b\": [\"n\", 3], \"eps\": 1e-05}\n";
        let expected = text.replace("64", "48");
        assert_eq!(set_number(text, "n", 48).as_deref(), Some(expected.as_str()));
    }

    #[test]
    fn absent_keys_and_other_types_are_refused() {
        for text in ["{}", "{\"n\": null}", "{\"n\": \"8\"}", "{\"m\": {\"n\": 8}}", "", "{\"n"] {
            assert_eq!(set_number(text, "n", 4), None, "{text}");
        }
    }
}

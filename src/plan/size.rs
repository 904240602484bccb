//! Sizes in bytes as people write them.

use super::{Error, Result};

/// Known units and what they stand for, without regard to case.
const UNITS: [(&str, u64); 10] = [
    ("", 1),
    ("B", 1),
    ("kB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
];

/// Parses a size such as `24GiB`, `13GB`, `1.5 MB`, `1.5e9` or `500000` (plain bytes); where there is a unit, a
/// fraction of a byte is dropped. Decimal units (kB, MB, GB, TB) are powers of 1000, binary ones (KiB, MiB, GiB, TiB) powers of
/// 1024.
///
/// # Errors
/// [`Error::Budget`] where the text has no number, a fraction without a unit, another unit, or a size that is not between 1 and 2⁶³
/// bytes.
pub fn parse_size(text: &str) -> Result<u64> {
    let refuse = |problem: &str| Error::Budget(format!("size `{text}`: {problem}"));
    let trimmed = text.trim();
    let number = trimmed.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = &trimmed[number.len()..];
    let number = number.trim_end();
    let Some(&(_, scale)) = UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)) else {
        return Err(refuse(&format!("unknown unit `{unit}`; use B, kB, MB, GB, TB, KiB, MiB, GiB or TiB")));
    };
    let largest = i64::MAX as u64;
    let bytes = if let Ok(whole) = number.parse::<u64>() {
        whole.saturating_mul(scale)
    } else {
        let value: f64 = number.parse().map_err(|_| refuse("expected a number and a unit, such as 24GiB"))?;
        if value.is_nan() {
            return Err(refuse("expected a number and a unit, such as 24GiB"));
        }
        if scale == 1 && value.fract() != 0.0 {
            return Err(refuse("there are no fractions of a byte; expected a unit, such as 24GiB"));
        }
        // Saturates at both ends, which the range check below refuses.
        (value * scale as f64) as u64
    };
    if bytes == 0 || bytes > largest {
        return Err(refuse("expected between 1 byte and 8 EiB"));
    }
    Ok(bytes)
}

/// A size for people: the exact number of bytes, and from a thousand on a rounded one beside it.
pub fn format_size(bytes: u64) -> String {
    let unit = UNITS[2..6].iter().rev().find(|(_, scale)| bytes >= *scale);
    match unit {
        Some((name, scale)) => format!("{bytes} bytes ({:.2} {name})", bytes as f64 / *scale as f64),
        None => format!("{bytes} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_with_and_without_units() {
        for (text, bytes) in [
            ("24GiB", 24 << 30),
            ("13GB", 13_000_000_000),
            ("500MB", 500_000_000),
            ("500mb", 500_000_000),
            ("1.5e9", 1_500_000_000),
            ("1.5 MiB", 1_572_864),
            (" 7 ", 7),
            ("9B", 9),
            ("2kb", 2000),
            ("2KiB", 2048),
            ("1TiB", 1 << 40),
            ("1TB", 1_000_000_000_000),
            ("9223372036854775807", i64::MAX as u64),
        ] {
            assert_eq!(parse_size(text).unwrap(), bytes, "{text}");
        }
    }

    #[test]
    fn sizes_that_are_none() {
        for (text, message) in [
            ("", "size ``: expected a number and a unit, such as 24GiB"),
            ("GiB", "size `GiB`: expected a number and a unit, such as 24GiB"),
            ("24G", "size `24G`: unknown unit `G`; use B, kB, MB, GB, TB, KiB, MiB, GiB or TiB"),
            ("inf", "size `inf`: unknown unit `inf`; use B, kB, MB, GB, TB, KiB, MiB, GiB or TiB"),
            ("1,5GB", "size `1,5GB`: expected a number and a unit, such as 24GiB"),
            ("0", "size `0`: expected between 1 byte and 8 EiB"),
            ("-3GB", "size `-3GB`: expected between 1 byte and 8 EiB"),
            ("0.5", "size `0.5`: there are no fractions of a byte; expected a unit, such as 24GiB"),
            ("5.5", "size `5.5`: there are no fractions of a byte; expected a unit, such as 24GiB"),
            ("5.5B", "size `5.5B`: there are no fractions of a byte; expected a unit, such as 24GiB"),
            ("1e30", "size `1e30`: expected between 1 byte and 8 EiB"),
            ("99999999TiB", "size `99999999TiB`: expected between 1 byte and 8 EiB"),
        ] {
            assert_eq!(parse_size(text).unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn sizes_for_people() {
        assert_eq!(format_size(999), "999 bytes");
        assert_eq!(format_size(1_500), "1500 bytes (1.50 kB)");
        assert_eq!(format_size(13_200_000_000), "13200000000 bytes (13.20 GB)");
    }
}

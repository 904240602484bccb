//! Numbers as people read and write them.

/// Scales `value` down by `factor` until it is written with fewer than four digits before the point.
fn scaled(value: u64, factor: f64, largest: usize, limit: f64) -> (f64, usize) {
    let (mut value, mut power) = (value as f64, 0);
    while value >= limit && power < largest {
        value /= factor;
        power += 1;
    }
    (value, power)
}

/// Bytes with a binary unit: `84.0 GiB`, `512 B`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    // What would round to 1024.0 belongs to the next unit.
    match scaled(count, 1024.0, UNITS.len() - 1, 1023.95) {
        (_, 0) => format!("{count} B"),
        (value, power) => format!("{value:.1} {}", UNITS[power]),
    }
}

/// A number of parameters with three significant digits: `46.7B`, `3.39M`, `512`.
pub(crate) fn parameters(count: u64) -> String {
    const UNITS: [&str; 5] = ["", "K", "M", "B", "T"];
    match scaled(count, 1000.0, UNITS.len() - 1, 999.5) {
        (_, 0) => count.to_string(),
        (value, power) => {
            let decimals = match value {
                v if v < 9.995 => 2,
                v if v < 99.95 => 1,
                _ => 0,
            };
            format!("{value:.decimals$}{}", UNITS[power])
        }
    }
}

/// A share in percent: `96.4 %`.
pub(crate) fn percent(part: u64, whole: u64) -> String {
    format!("{:.1} %", 100.0 * part as f64 / whole.max(1) as f64)
}

/// Seconds: `0.42 s`, `12.3 s`, `4 min 07 s`, `3 h 12 min`.
pub(crate) fn seconds(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match seconds {
        s if s < 9.995 => format!("{s:.2} s"),
        s if s < 59.95 => format!("{s:.1} s"),
        s if s < 3599.5 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

/// A rate of tokens: `8.31 tokens/s`, `1234 tokens/s`.
pub(crate) fn rate(tokens_per_second: f64) -> String {
    let decimals = if tokens_per_second < 10.0 { 2 } else { 0 };
    format!("{tokens_per_second:.decimals$} tokens/s")
}

/// `1 window`, `2 windows`.
pub(crate) fn counted(count: usize, thing: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {thing}{plural}")
}

/// Reads a whole number of at least `LEAST`.
///
/// # Errors
/// Says what would be right.
pub(crate) fn parse_at_least<const LEAST: usize>(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if number >= LEAST => Ok(number),
        _ => Err(format!("expected a whole number, {LEAST} or more")),
    }
}

/// Reads the seed of a random choice.
///
/// # Errors
/// Says what would be right.
pub(crate) fn parse_seed(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("expected a whole number from 0 to {}", u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_written_as_people_write_them() {
        let cases = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1048575, "1.0 MiB"),
            (109720, "107.1 KiB"),
            (90194313216, "84.0 GiB"),
        ];
        for (count, expected) in cases {
            assert_eq!(bytes(count), expected);
        }
        let cases = [
            (0, "0"),
            (999, "999"),
            (1000, "1.00K"),
            (3_391_234, "3.39M"),
            (9_996_000, "10.0M"),
            (999_600_000, "1.00B"),
            (46_702_792_704, "46.7B"),
            (671_026_419_200, "671B"),
        ];
        for (count, expected) in cases {
            assert_eq!(parameters(count), expected);
        }
    }

    #[test]
    fn times_and_shares() {
        assert_eq!(seconds(0.5), "0.50 s");
        assert_eq!(seconds(59.96), "1 min 00 s");
        assert_eq!(seconds(247.2), "4 min 07 s");
        assert_eq!(seconds(11_520.0), "3 h 12 min");
        assert_eq!(percent(0, 0), "0.0 %");
        assert_eq!(percent(45, 46), "97.8 %");
    }
}

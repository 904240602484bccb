//! Aligned columns.

use std::fmt::{self, Write as _};

/// Where the cells of a column stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Align {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

/// A table with a heading.
#[derive(Debug)]
pub(crate) struct Table {
    columns: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Columns of words and numbers, in order.
    pub(crate) fn new<S: Into<String>>(columns: impl IntoIterator<Item = (S, Align)>) -> Self {
        let columns = columns.into_iter().map(|(heading, align)| (heading.into(), align)).collect();
        Table { columns, rows: Vec::new() }
    }

    /// Adds a row, one cell per column.
    pub(crate) fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }

    fn width(&self, column: usize) -> usize {
        let cells = self.rows.iter().filter_map(|row| row.get(column));
        let widths = cells.chain([&self.columns[column].0]).map(|cell| cell.chars().count());
        widths.max().unwrap_or(0)
    }

    fn line<'a>(&'a self, cells: impl Iterator<Item = &'a String>, widths: &[usize]) -> String {
        let mut line = String::new();
        for ((cell, &width), (_, align)) in cells.zip(widths).zip(&self.columns) {
            if !line.is_empty() {
                line.push_str("  ");
            }
            let _ = match align {
                Align::Left => write!(line, "{cell:<width$}"),
                Align::Right => write!(line, "{cell:>width$}"),
            };
        }
        line.truncate(line.trim_end().len());
        line
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths: Vec<usize> = (0..self.columns.len()).map(|c| self.width(c)).collect();
        writeln!(f, "{}", self.line(self.columns.iter().map(|(heading, _)| heading), &widths))?;
        self.rows.iter().try_for_each(|row| writeln!(f, "{}", self.line(row.iter(), &widths)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new([("layers", Align::Left), ("experts", Align::Right), ("", Align::Left)]);
        table.row(["0–26", "8", "dense"]);
        table.row(["27", "160", ""]);
        assert_eq!(table.to_string(), "layers  experts\n0–26          8  dense\n27          160\n");
    }
}

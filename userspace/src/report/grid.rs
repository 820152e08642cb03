//! A table that becomes text or HTML.

use crate::{
    chart::{clean, escape},
    table::Table,
};

/// What stands where there is no value.
const ABSENT: &str = "-";
/// Words of so many letters stay in one line.
const UNBROKEN: usize = 24;

/// A table.
pub(super) struct Grid {
    /// Its heading.
    pub title: &'static str,
    /// What a reader has to know about it; may be empty.
    pub about: String,
    columns: Vec<Column>,
    rows: Vec<Vec<Cell>>,
}

/// One column: one quantity, one unit.
pub(super) struct Column {
    name: String,
    /// Aligned to the left.
    words: bool,
    /// Left out if it has no values.
    optional: bool,
}

/// One value.
pub(super) struct Cell {
    value: Option<String>,
    /// The interval in which it lies.
    interval: Option<String>,
}

impl Column {
    /// Names and sentences.
    pub fn words(name: impl Into<String>) -> Self {
        Self { name: name.into(), words: true, optional: false }
    }

    /// Numbers.
    pub fn number(name: impl Into<String>) -> Self {
        Self { name: name.into(), words: false, optional: false }
    }

    /// Left out if it has no values.
    pub fn if_any(mut self) -> Self {
        self.optional = true;
        self
    }
}

impl Cell {
    /// A value, if there is one.
    pub fn of(value: Option<impl ToString>) -> Self {
        Self { value: value.map(|value| value.to_string()), interval: None }
    }

    /// Words.
    pub fn words(words: &str) -> Self {
        Self::of((!words.is_empty()).then_some(words))
    }

    /// With the interval in which it lies.
    pub fn within(mut self, interval: Option<String>) -> Self {
        self.interval = interval;
        self
    }

    fn text(&self, intervals: bool) -> String {
        let value = self.value.as_deref().map_or(ABSENT.to_owned(), clean);
        match &self.interval {
            Some(interval) if intervals => format!("{value} ({interval})"),
            _ => value,
        }
    }

    fn html(&self) -> String {
        let value = self.value.as_deref().unwrap_or(ABSENT);
        match &self.interval {
            Some(interval) => format!("{}<small>{}</small>", escape(value), escape(interval)),
            None => escape(value),
        }
    }
}

impl Grid {
    /// A table without rows.
    pub fn new(title: &'static str, columns: Vec<Column>) -> Self {
        Self { title, about: String::new(), columns, rows: Vec::new() }
    }

    /// Adds a row: a cell for each column.
    pub fn row(&mut self, cells: Vec<Cell>) {
        debug_assert_eq!(cells.len(), self.columns.len());
        self.rows.push(cells);
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// The columns that are shown, by their place.
    fn shown(&self) -> Vec<usize> {
        let has_values = |column: usize| self.rows.iter().any(|row| row[column].value.is_some());
        (0..self.columns.len()).filter(|&column| !self.columns[column].optional || has_values(column)).collect()
    }

    /// As text, if wished with the intervals of values.
    pub fn text(&self, intervals: bool) -> String {
        let shown = self.shown();
        let header: Vec<String> = shown.iter().map(|&column| clean(&self.columns[column].name)).collect();
        let mut table = Table::new(header.iter().map(String::as_str));
        for (place, &column) in shown.iter().enumerate() {
            if self.columns[column].words {
                table = table.left(place);
            }
        }
        for row in &self.rows {
            table.row(shown.iter().map(|&column| row[column].text(intervals)));
        }
        table.to_string()
    }

    /// As HTML. The first column names the rows.
    pub fn html(&self) -> String {
        let shown = self.shown();
        let class = |column: usize, length: usize| match (self.columns[column].words, length <= UNBROKEN) {
            (true, true) => " class=\"w n\"",
            (true, false) => " class=\"w\"",
            (false, _) => "",
        };
        let mut html = format!(
            "<div class=\"t\" tabindex=\"0\" role=\"region\" aria-label=\"{0}\"><table><caption>{0}</caption><thead><tr>",
            self.title
        );
        for &column in &shown {
            let name = &self.columns[column].name;
            html += &format!("<th scope=\"col\"{}>{}</th>", class(column, name.len()), escape(name));
        }
        html += "</tr></thead><tbody>\n";
        for row in &self.rows {
            html += "<tr>";
            for (place, &column) in shown.iter().enumerate() {
                let length = row[column].value.as_ref().map_or(0, |value| value.chars().count());
                let (class, cell) = (class(column, length), row[column].html());
                html += &if place == 0 {
                    format!("<th scope=\"row\"{class}>{cell}</th>")
                } else {
                    format!("<td{class}>{cell}</td>")
                };
            }
            html += "</tr>\n";
        }
        html += "</tbody></table></div>\n";
        if !self.about.is_empty() {
            html += &format!("<p class=\"about\">{}</p>\n", escape(&self.about));
        }
        html
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid() -> Grid {
        let mut grid = Grid::new(
            "A table",
            vec![Column::words("run"), Column::number("level").if_any(), Column::number("p50 us")],
        );
        grid.row(vec![Cell::words("<b>"), Cell::of(None::<u8>), Cell::of(Some(1.5)).within(Some("1 to 2".to_owned()))]);
        grid.row(vec![Cell::words("qjump\u{1b}[31m"), Cell::of(None::<u8>), Cell::of(None::<u8>)]);
        grid
    }

    #[test]
    fn text_is_aligned_and_has_intervals_on_demand() {
        assert_eq!(grid().text(false), "run         p50 us\n<b>            1.5\nqjump\u{fffd}[31m       -\n");
        assert!(grid().text(true).contains("1.5 (1 to 2)"));
    }

    #[test]
    fn html_is_escaped_and_has_headers() {
        let html = grid().html();
        assert!(html.contains("<th scope=\"row\" class=\"w n\">&lt;b&gt;</th>") && !html.contains("<b>"), "{html}");
        assert!(html.contains("<th scope=\"col\">p50 us</th>") && !html.contains("level"), "{html}");
        assert!(html.contains("1.5<small>1 to 2</small>"), "{html}");
    }
}

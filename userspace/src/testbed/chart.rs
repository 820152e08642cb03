//! Pictures of latency distributions, readable in black and white.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

/// One distribution.
pub struct Curve {
    /// What it is.
    pub name: String,
    /// (ns, share of samples above), in ascending order of time.
    pub points: Vec<(f64, f64)>,
}

struct Style {
    colour: RGBColor,
    width: u32,
    /// Length and gap of the dashes, pixels; `None` for a solid line.
    dash: Option<(u32, u32)>,
}

/// Told apart by width and dashes, not by colour alone.
const STYLES: [Style; 5] = [
    Style { colour: RGBColor(110, 110, 110), width: 1, dash: None },
    Style { colour: RGBColor(200, 60, 20), width: 2, dash: Some((10, 5)) },
    Style { colour: RGBColor(0, 90, 180), width: 3, dash: None },
    Style { colour: RGBColor(150, 100, 0), width: 2, dash: Some((3, 4)) },
    Style { colour: RGBColor(0, 130, 90), width: 3, dash: Some((14, 4)) },
];

const WIDTH: u32 = 960;
const HEIGHT: u32 = 560;
const LEGEND_X: i32 = WIDTH as i32 - 172;
const LEGEND_LINE: i32 = 34;

/// Draws complementary distributions on two log axes, with the bound as a line.
///
/// # Errors
/// If the file cannot be written.
pub fn ccdf(path: &Path, title: &str, curves: &[Curve], bound_ns: f64) -> Result<()> {
    draw(path, title, curves, bound_ns).map_err(|error| anyhow!("cannot draw {}: {error}", path.display()))
}

fn draw(path: &Path, title: &str, curves: &[Curve], bound_ns: f64) -> Result<(), Box<dyn std::error::Error>> {
    let times = || curves.iter().flat_map(|curve| curve.points.iter().map(|point| point.0 / 1e3));
    let bound_us = bound_ns / 1e3;
    let left = times().fold(bound_us, f64::min).max(0.1);
    let right = times().fold(bound_us, f64::max);
    // Whole decades, so that the labels are round numbers.
    let (left, right) = (10f64.powf(left.log10().floor()), 10f64.powf(right.log10().ceil()));
    let lowest = curves.iter().flat_map(|curve| curve.points.iter().map(|p| p.1)).fold(1.0, f64::min);
    let bottom = 10f64.powf(lowest.log10().floor());

    let area = SVGBackend::new(path, (WIDTH, HEIGHT)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 22))
        .margin(16)
        .margin_right(190)
        .x_label_area_size(48)
        .y_label_area_size(84)
        .build_cartesian_2d((left..right).log_scale(), (bottom..1.0).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("one-way latency, us")
        .y_desc("share of probes that took longer")
        .x_label_formatter(&|value| plain(*value))
        .y_label_formatter(&|value| format!("{value:e}").replace("1e0", "1"))
        .light_line_style(WHITE)
        .axis_desc_style(("sans-serif", 16))
        .label_style(("sans-serif", 14))
        .draw()?;

    let (_, plot_y) = chart.plotting_area().get_pixel_range();
    for (index, curve) in curves.iter().enumerate() {
        let style = &STYLES[index % STYLES.len()];
        let points: Vec<(f64, f64)> = curve.points.iter().map(|&(ns, share)| (ns / 1e3, share)).collect();
        if let Some(&last) = points.last() {
            chart.draw_series([Circle::new(last, 3, style.colour.filled())])?;
        }
        let stroke = style.colour.stroke_width(style.width);
        match style.dash {
            None => chart.draw_series(LineSeries::new(points, stroke))?,
            Some((length, gap)) => chart.draw_series(DashedLineSeries::new(points, length, gap, stroke))?,
        };
        // The legend, outside the plot, in the order of the table.
        let y = plot_y.start + 16 + 24 * index as i32;
        for (from, to) in dashes(style.dash) {
            let dash = vec![(LEGEND_X + from, y), (LEGEND_X + to, y)];
            area.draw(&PathElement::new(dash, style.colour.stroke_width(style.width)))?;
        }
        area.draw(&Text::new(curve.name.clone(), (LEGEND_X + 42, y - 8), ("sans-serif", 15)))?;
    }

    chart.draw_series(LineSeries::new([(bound_us, bottom), (bound_us, 1.0)], BLACK.stroke_width(2)))?;
    let (x, y) = chart.backend_coord(&(bound_us, 1.0));
    area.draw(&Text::new(format!("bound {} us", plain(bound_us)), (x + 5, y + 4), ("sans-serif", 15)))?;
    area.present()?;
    Ok(())
}

/// Where the dashes of a line in the legend begin and end, pixels.
fn dashes(dash: Option<(u32, u32)>) -> Vec<(i32, i32)> {
    let (length, gap) = dash.map_or((LEGEND_LINE, 0), |(length, gap)| (length as i32, gap as i32));
    (0..LEGEND_LINE).step_by((length + gap) as usize).map(|from| (from, (from + length).min(LEGEND_LINE))).collect()
}

fn plain(value: f64) -> String {
    if value >= 10.0 { format!("{value:.0}") } else { format!("{value}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_legend_has_the_dashes_of_the_curve() {
        assert_eq!(dashes(None), [(0, 34)]);
        assert_eq!(dashes(Some((10, 5))), [(0, 10), (15, 25), (30, 34)]);
    }

    #[test]
    fn draws_every_curve_and_the_bound() {
        let file = std::env::temp_dir().join(format!("qjump-chart-{}.svg", std::process::id()));
        let curve = |name: &str, at: f64| Curve { name: name.to_owned(), points: vec![(at, 1.0), (at * 2.0, 0.01)] };
        ccdf(&file, "a title", &[curve("first", 1e4), curve("second", 1e6)], 5e5).unwrap();
        let svg = std::fs::read_to_string(&file).unwrap();
        std::fs::remove_file(&file).unwrap();
        for part in ["a title", "first", "second", "bound 500 us", "one-way latency, us"] {
            assert!(svg.contains(part), "{part}");
        }
    }
}

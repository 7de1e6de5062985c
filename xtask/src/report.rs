//! `cargo xtask report`: measures this machine and writes `docs/performance.md` with its charts.
//!
//! The page is a list of sections; each is a function of its own file that measures and returns its text and charts.

mod accuracy;
mod chart;
mod dense;
mod lab;
mod machine;
mod moe;

use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::workspace;
pub use lab::Lab;

/// A part of the page.
pub struct Section {
    /// Its heading.
    pub title: &'static str,
    /// Its text, in Markdown, without the heading.
    pub text: String,
    /// Its charts: file names, and SVG. The text links them as `performance/NAME`.
    pub charts: Vec<(String, String)>,
}

/// Measures one section.
type Measure = fn(&mut Lab) -> Result<Section>;

/// The sections in the order of the page; a new one is added here.
const SECTIONS: [Measure; 3] = [dense::measure, moe::measure, accuracy::measure];

/// Measures everything and writes the page.
pub fn command(quick: bool) -> Result<ExitCode> {
    let root = workspace::root();
    let mut lab = Lab::open(quick)?;
    let load = machine::load();
    let mut sections = Vec::new();
    for measure in SECTIONS {
        sections.push(measure(&mut lab)?);
    }
    let about = format!("{}\n{}", machine::describe(&root), machine::conditions(quick, load, machine::load()));
    write(&root.join("docs"), &about, &sections)?;
    println!("report: docs/performance.md, docs/performance/*.svg");
    Ok(ExitCode::SUCCESS)
}

fn write(docs: &Path, about: &str, sections: &[Section]) -> Result<()> {
    let folder = docs.join("performance");
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let save = |path: &Path, text: &str| {
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    for (name, svg) in sections.iter().flat_map(|section| &section.charts) {
        save(&folder.join(name), svg)?;
    }
    save(&docs.join("performance.md"), &page(about, sections))
}

fn page(about: &str, sections: &[Section]) -> String {
    let mut page =
        String::from("# Performance\n\nWritten by `cargo xtask report`; run it again rather than edit this page.\n\n");
    page.push_str(about);
    for Section { title, text, .. } in sections {
        let _ = write!(page, "\n## {title}\n\n{}\n", text.trim_end());
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_its_sections_in_order_and_their_charts_as_files() {
        let docs = tempfile::tempdir().unwrap();
        let section = |title, chart: &str| Section {
            title,
            text: format!("![x](performance/{chart})\n\n"),
            charts: vec![(chart.to_owned(), "<svg/>".to_owned())],
        };
        write(docs.path(), "A machine.\n", &[section("One", "1.svg"), section("Two", "2.svg")]).unwrap();
        let page = std::fs::read_to_string(docs.path().join("performance.md")).unwrap();
        let expected = "A machine.\n\n## One\n\n![x](performance/1.svg)\n\n## Two\n\n![x](performance/2.svg)\n";
        assert!(page.starts_with("# Performance\n") && page.ends_with(expected), "{page}");
        assert_eq!(std::fs::read_to_string(docs.path().join("performance/2.svg")).unwrap(), "<svg/>");
    }
}

//! Prints the custom resource definitions as YAML.
#![allow(clippy::print_stdout)]

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for crd in osimage_crds::all() {
        print!("---\n{}", serde_saphyr::to_string(&crd)?);
    }
    Ok(())
}

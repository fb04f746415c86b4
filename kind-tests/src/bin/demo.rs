//! `make demo`: see `osimage_kind_tests::demo`.

use std::process::ExitCode;

fn main() -> ExitCode {
    osimage_kind_tests::demo::main()
}

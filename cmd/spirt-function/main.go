// Command spirt-function is SPIRT's gradient function alone, for AWS Lambda (as the file "bootstrap" of a provided.al2023
// function) and for small devices: without network stack, database and command line. docs/functions.md has its contract.
package main

import (
	"os"

	"github.com/spirt-ml/spirt/function/gradient"
)

func main() { os.Exit(gradient.Main()) }

// Summary reads files of `go test -json` lines, prints what failed, then a
// line per package, then how many tests (subtests included) passed and failed,
// and exits 1 if one failed. A package that failed without a failing test (it
// did not build, timed out or crashed) counts as one failure.
package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"fmt"
	"os"
	"strings"
)

type event struct {
	Action, Package, ImportPath, Test, Output, FailedBuild string
	Elapsed                                                float64
}

func main() {
	passed, failed := 0, 0
	for _, name := range os.Args[1:] {
		p, f, err := summarise(name)
		if err != nil {
			fmt.Fprintf(os.Stderr, "summary: %v\n", err)
			os.Exit(1)
		}
		passed, failed = passed+p, failed+f
	}
	fmt.Printf("%d passed, %d failed\n", passed, failed)
	if failed > 0 || passed == 0 {
		os.Exit(1)
	}
}

func summarise(name string) (passed, failed int, err error) {
	file, err := os.Open(name)
	if err != nil {
		return 0, 0, err
	}
	defer file.Close()
	fmt.Printf("== %s\n", name)

	type test struct{ pkg, name string }
	output := map[test]*strings.Builder{}
	inPackage := map[string]int{} // failed tests of each package
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var e event
		if json.Unmarshal(lines.Bytes(), &e) != nil || e.Action == "" {
			fmt.Println(lines.Text()) // from make, not from a test
			continue
		}
		key := test{cmp.Or(e.Package, e.ImportPath), e.Test}
		switch e.Action {
		case "output", "build-output":
			if output[key] == nil {
				output[key] = &strings.Builder{}
			}
			output[key].WriteString(e.Output)
			continue
		case "build-fail":
			show(output[key])
			continue
		case "pass", "skip", "fail":
		default:
			continue
		}
		switch {
		case e.Action == "fail" && e.Test != "":
			failed++
			inPackage[e.Package]++
			fmt.Printf("FAIL %s %s\n", e.Package, e.Test)
			show(output[key])
		case e.Action == "pass" && e.Test != "":
			passed++
		case e.Action == "fail": // the package as a whole
			if inPackage[e.Package] == 0 {
				failed++
				for k, b := range output { // and of tests that did not end
					if k.pkg == e.Package {
						fmt.Printf("FAIL %s %s\n", k.pkg, k.name)
						show(b)
					}
				}
			}
			fmt.Printf("FAIL %s %.1fs\n", e.Package, e.Elapsed)
			delete(inPackage, e.Package)
		case e.Action == "pass":
			fmt.Printf("ok   %s %.1fs\n", e.Package, e.Elapsed)
		}
		delete(output, key)
	}
	return passed, failed, lines.Err()
}

func show(b *strings.Builder) {
	if b != nil {
		fmt.Print(b.String())
	}
}

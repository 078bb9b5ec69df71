package main

import (
	"os"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// TestMain lets the test binary stand in for spirt: as itself in scripts, and
// as the peers and instances that it starts.
func TestMain(m *testing.M) {
	if as := os.Getenv("SPIRT_TEST_MAIN"); len(os.Args) > 1 && (as != "" || os.Args[1] == "peer" || os.Args[1] == "function" || os.Args[1] == "train" || os.Args[1] == "db") {
		main()
	}
	testscript.Main(m, map[string]func(){"spirt": main})
}

func TestScripts(t *testing.T) {
	data, err := filepath.Abs(filepath.Join("..", "..", "dataset", "mnist-10k"))
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir:           filepath.Join("testdata", "script"),
		UpdateScripts: os.Getenv("UPDATE_SCRIPTS") != "",
		Cmds:          map[string]func(ts *testscript.TestScript, neg bool, args []string){"await": await},
		Setup: func(e *testscript.Env) error {
			e.Setenv("MNIST", data)
			return nil
		},
	})
}

// await waits until a file, which need not be there yet, matches an expression.
func await(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: await file expression")
	}
	want := regexp.MustCompile(args[1])
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for range 6000 {
		if b, err := os.ReadFile(ts.MkAbs(args[0])); err == nil && want.Match(b) {
			return
		}
		<-tick.C
	}
	ts.Fatalf("%s does not match %s", args[0], args[1])
}

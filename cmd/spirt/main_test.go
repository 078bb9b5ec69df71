package main

import (
	"os"
	"path/filepath"
	"testing"

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
		Setup: func(e *testscript.Env) error {
			e.Setenv("MNIST", data)
			return nil
		},
	})
}

package main

import (
	"bytes"
	"image"
	"image/jpeg"
	"image/png"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/spirt-ml/spirt/dataset"
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
	t.Parallel() // with other tests that wait
	data, err := filepath.Abs(filepath.Join("..", "..", "dataset", "mnist-10k"))
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir:           filepath.Join("testdata", "script"),
		UpdateScripts: os.Getenv("UPDATE_SCRIPTS") != "",
		Cmds:          map[string]func(ts *testscript.TestScript, neg bool, args []string){"await": await, "digit": digit},
		Setup: func(e *testscript.Env) error {
			e.Setenv("MNIST", data)
			return nil
		},
	})
}

// digit writes a test image of MNIST-10k five times as large, as a PNG or by
// the file's name a JPEG; with "paper", dark on bright.
func digit(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 || len(args) > 3 {
		ts.Fatalf("usage: digit index file [paper]")
	}
	index, err := strconv.Atoi(args[0])
	ts.Check(err)
	data, err := dataset.Open("mnist-10k")
	ts.Check(err)
	_, _, test := data.Split()
	pixels, _ := data.Rows(dataset.Range{Lo: test.Lo + index, Hi: test.Lo + index + 1})
	img := image.NewGray(image.Rect(0, 0, 140, 140))
	for i := range img.Pix {
		img.Pix[i] = pixels[i/140/5*28+i%140/5]
		if len(args) == 3 {
			img.Pix[i] = 255 - img.Pix[i]
		}
	}
	var b bytes.Buffer
	if strings.HasSuffix(args[1], ".jpg") {
		err = jpeg.Encode(&b, img, nil)
	} else {
		err = png.Encode(&b, img)
	}
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), b.Bytes(), 0o644))
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

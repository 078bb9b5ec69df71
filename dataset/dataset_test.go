package dataset

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

func TestMNIST10k(t *testing.T) {
	d, err := Open("mnist-10k")
	if err != nil {
		t.Fatal(err)
	}
	if d.Len() != 10000 || d.Classes != 10 || !slices.Equal(d.Shape, []int{1, 28, 28}) || len(d.Images) != 10000*28*28 {
		t.Fatalf("%d images of %v in %d classes", d.Len(), d.Shape, d.Classes)
	}
	train, validation, test := d.Split()
	if train != (Range{0, 7000}) || validation != (Range{7000, 8000}) || test != (Range{8000, 10000}) {
		t.Errorf("split %v %v %v", train, validation, test)
	}
	sum := func(b []byte) string { h := sha256.Sum256(b); return hex.EncodeToString(h[:8]) }
	if got := sum(d.Images); got != "e2e2b90ae280e953" {
		t.Errorf("sha256 of the pixels starts with %s", got)
	}
	if got := sum(d.Labels); got != "ff112d7e61d49e00" {
		t.Errorf("sha256 of the labels starts with %s", got)
	}
	// Bits, not only values: peers must agree on them.
	if s, o := math.Float32bits(d.Scale), math.Float32bits(d.Offset); s != 0x3c506990 || o != 0xbed92f1d {
		t.Errorf("normalisation %#x %#x (%g %g)", s, o, d.Scale, d.Offset)
	}
	// Every class is in every range often enough to be learned and measured.
	for _, r := range []Range{train, validation, test} {
		var count [10]int
		_, labels := d.Rows(r)
		for _, l := range labels {
			count[l]++
		}
		if slices.Min(count[:]) < r.Len()/15 {
			t.Errorf("labels in %v: %v", r, count)
		}
	}
}

func TestNormalisation(t *testing.T) {
	d, err := Open("mnist-10k")
	if err != nil {
		t.Fatal(err)
	}
	train, _, _ := d.Split()
	x := make([]float32, train.Len()*d.Stride())
	d.Floats(x, train)
	var sum, squares float64
	for _, v := range x {
		sum += float64(v)
		squares += float64(v) * float64(v)
	}
	mean := sum / float64(len(x))
	if deviation := math.Sqrt(squares/float64(len(x)) - mean*mean); math.Abs(mean) > 1e-4 || math.Abs(deviation-1) > 1e-4 {
		t.Errorf("mean %g, deviation %g", mean, deviation)
	}
	if got, want := x[0], float32(float32(d.Images[0])*d.Scale)+d.Offset; got != want {
		t.Errorf("pixel %d became %g, not %g", d.Images[0], got, want)
	}
	if s, o := normalisation([]byte{7, 7, 7}); s != 1.0/255 || o != -7.0/255 {
		t.Errorf("pixels that are all alike: %g %g", s, o)
	}
}

func TestOpenConcurrently(t *testing.T) {
	var wg sync.WaitGroup
	opened := make([]*Dataset, 4)
	for i := range opened {
		wg.Go(func() { opened[i], _ = Open("mnist-10k") })
	}
	wg.Wait()
	opened[0].Scale = 5
	for _, d := range opened[1:] {
		if d == nil || d.Scale == 5 {
			t.Fatal("callers share a Dataset")
		}
		if &d.Images[0] != &opened[0].Images[0] {
			t.Error("unpacked twice")
		}
	}
}

func TestOpenUnknown(t *testing.T) {
	folder := t.TempDir()
	for _, c := range []struct{ name, want string }{
		{"mnist10k", `unknown data set "mnist10k": there are mnist-10k and idx:FOLDER`},
		{"", `unknown data set "": there are mnist-10k and idx:FOLDER`},
		{folder, fmt.Sprintf("unknown data set %q: there are idx:%s and mnist-10k", folder, folder)},
		{"idx:", `data set "idx:" names no folder: write idx:FOLDER`},
		{"idx:" + folder, "the folder has no file *images*idx3* or *images*idx3*.gz"},
		{"idx:" + filepath.Join(folder, "none"), "no such file or directory"},
	} {
		if _, err := Open(c.name); err == nil || !strings.Contains(strings.ReplaceAll(err.Error(), "The system cannot find the file specified.", "no such file or directory"), c.want) {
			t.Errorf("%q: %v, want %s", c.name, err, c.want)
		}
	}
}

// write makes the files of a map and returns their folder.
func write(t *testing.T, files map[string][]byte) string {
	t.Helper()
	folder := t.TempDir()
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(folder, name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return folder
}

func TestOpenFolder(t *testing.T) {
	pixels := []byte{0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110}
	images, labels := encode([]int{2, 2, 3}, pixels), encode([]int{2}, []byte{4, 1})
	for name, files := range map[string]map[string][]byte{
		"plain":         {"t10k-images-idx3-ubyte": images, "t10k-labels-idx1-ubyte": labels},
		"dots":          {"t10k-images.idx3-ubyte": images, "t10k-labels.idx1-ubyte": labels},
		"gzip":          {"images-idx3-ubyte.gz": pack(images), "labels-idx1-ubyte.gz": pack(labels)},
		"mixed":         {"Images-IDX3": images, "labels-idx1.gz": pack(labels), "notes.txt": nil},
		"wrong ending":  {"a-images-idx3.gz": images, "a-labels-idx1": pack(labels)},
		"other labels":  {"t10k-images-idx3": images, "t10k-labels-idx1.gz": pack(labels), "train-labels-idx1.gz": nil},
		"another name":  {"my-images-idx3": images, "the-labels-idx1": labels},
		"gzip in parts": {"images-idx3": slices.Concat(pack(images[:9]), pack(images[9:])), "labels-idx1": labels},
	} {
		d, err := Open("idx:" + write(t, files))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !slices.Equal(d.Shape, []int{1, 2, 3}) || d.Classes != 5 || !bytes.Equal(d.Images, pixels) || !bytes.Equal(d.Labels, []byte{4, 1}) {
			t.Errorf("%s: %+v", name, d)
		}
		x := make([]float32, 6)
		if d.Floats(x, Range{1, 2}); x[0] != float32(60*d.Scale)+d.Offset {
			t.Errorf("%s: first pixel of image 1 is %g", name, x[0])
		}
	}
}

func TestOpenFolderRefuses(t *testing.T) {
	images, labels := encode([]int{2, 1, 1}, []byte{1, 2}), encode([]int{2}, []byte{4, 1})
	for name, c := range map[string]struct {
		files map[string][]byte
		want  string
	}{
		"no labels":  {map[string][]byte{"images-idx3": images}, "no file *labels*idx1* or"},
		"no images":  {map[string][]byte{"labels-idx1": labels}, "no file *images*idx3* or"},
		"two images": {map[string][]byte{"a-images-idx3": images, "b-images-idx3.gz": images, "a-labels-idx1": labels}, "2 files *images*idx3* (a-images-idx3, b-images-idx3.gz): leave one"},
		"two labels": {map[string][]byte{"images-idx3": images, "a-labels-idx1": labels, "b-labels-idx1": labels}, "2 files *labels*idx1* (a-labels-idx1, b-labels-idx1)"},
		"counts":     {map[string][]byte{"images-idx3": images, "labels-idx1": encode([]int{3}, []byte{1, 2, 3})}, "images-idx3 has 2 images and labels-idx1 has 3 labels"},
		"truncated":  {map[string][]byte{"images-idx3": images[:17], "labels-idx1": labels}, "images-idx3: truncated at byte 17, its header promises 18 bytes"},
		"swapped":    {map[string][]byte{"images-idx3": labels, "labels-idx1": images}, "images-idx3: truncated at byte 10, in its header of 16 bytes"},
	} {
		if _, err := Open("idx:" + write(t, c.files)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %s", name, err, c.want)
		}
	}
}

func TestFits(t *testing.T) {
	d := &Dataset{Name: "idx:x", Shape: []int{1, 28, 28}, Labels: []uint8{3, 9, 11}}
	if err := d.Fits([]int{1, 28, 28}, 12); err != nil {
		t.Error(err)
	}
	if err := d.Fits([]int{1, 28, 28}, 10); err == nil || err.Error() != `data set "idx:x": label 11 of image 2 is out of range, the model knows 10 classes` {
		t.Error(err)
	}
	if err := d.Fits([]int{3, 32, 32}, 12); err == nil || err.Error() != `data set "idx:x" has images of 1x28x28, the model takes 3x32x32` {
		t.Error(err)
	}
}

func TestSplitSmall(t *testing.T) {
	for n := range 50 {
		a, b, c := (&Dataset{Labels: make([]uint8, n)}).Split()
		if a.Lo != 0 || a.Hi != b.Lo || b.Hi != c.Lo || c.Hi != n || a.Len() != n*7/10 || b.Len() < 0 {
			t.Errorf("%d: %v %v %v", n, a, b, c)
		}
	}
}

func BenchmarkUnpackMNIST10k(b *testing.B) {
	for b.Loop() {
		if _, err := readIDX(strings.NewReader(mnistImages), int64(len(mnistImages)), "images", 3); err != nil {
			b.Fatal(err)
		}
	}
}

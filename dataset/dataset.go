// Package dataset holds labelled grey images for training: the embedded
// MNIST-10k, and any pair of IDX files from a folder.
//
// Call Open first. Split cuts a data set into a training, a validation and a
// test range; Order says which rows of a range each minibatch holds.
//
// All of it is a pure function of its arguments: the same name, seed, peer
// and minibatch number give the same rows on every CPU. Images stay bytes;
// whoever computes on them turns a byte b into float32(b*Scale) + Offset.
//
// Limits: images of one channel and bytes only, up to MaxBytes of pixels, held
// in memory as a whole. Files are checked (magic, sizes, counts, gzip
// checksum) before their content is believed.
package dataset

import (
	"fmt"
	"io/fs"
	"math"
	"os"
	"slices"
	"strings"
)

// A Dataset is a list of images with one label each. Images and Labels may be
// shared with other callers of Open and must not be changed.
type Dataset struct {
	Name    string
	Shape   []int   // of one image: channels, height, width
	Classes int     // labels are below it
	Images  []byte  // Len() images, row-major, one byte a pixel
	Labels  []uint8 // Len() labels

	// Scale and Offset normalise a pixel b: x = float32(b*Scale) + Offset.
	// They bring the training range to mean 0 and deviation 1.
	Scale, Offset float32
}

// A Range is the rows from Lo up to, not including, Hi.
type Range struct{ Lo, Hi int }

// Len returns the number of rows in r.
func (r Range) Len() int { return r.Hi - r.Lo }

const (
	mnist10k  = "mnist-10k"
	idxPrefix = "idx:"
)

// Open returns a data set by name: "mnist-10k" is embedded, "idx:FOLDER" reads
// the one *images*idx3* file of a folder with its *labels*idx1* file, each
// plain or gzipped.
func Open(name string) (*Dataset, error) {
	if name == mnist10k {
		return openMNIST10k()
	}
	if folder, ok := strings.CutPrefix(name, idxPrefix); ok {
		if folder == "" {
			return nil, fmt.Errorf("data set %q names no folder: write idx:FOLDER", name)
		}
		d, err := openFolder(os.DirFS(folder), name)
		if err != nil {
			return nil, fmt.Errorf("opening data set %q: %w", name, err)
		}
		return d, nil
	}
	names := []string{mnist10k, idxPrefix + "FOLDER"}
	if info, err := os.Stat(name); name != "" && err == nil && info.IsDir() {
		names = []string{idxPrefix + name, mnist10k}
	}
	return nil, fmt.Errorf("unknown data set %q: there are %s", name, strings.Join(names, " and "))
}

// Len returns the number of images.
func (d *Dataset) Len() int { return len(d.Labels) }

// Stride returns the number of pixels, which is also of bytes, of one image.
func (d *Dataset) Stride() int {
	n := 1
	for _, s := range d.Shape {
		n *= s
	}
	return n
}

// Split cuts the data set in file order: the first 70 % train, the next 10 %
// validate, the last 20 % test. Borders are rounded down, so a range may be
// empty in a data set of fewer than ten images.
func (d *Dataset) Split() (train, validation, test Range) {
	n := d.Len()
	a, b := int(int64(n)*7/10), int(int64(n)*8/10)
	return Range{0, a}, Range{a, b}, Range{b, n}
}

// All returns the range of every row.
func (d *Dataset) All() Range { return Range{0, d.Len()} }

// Rows returns the images and labels of r, without copying them.
func (d *Dataset) Rows(r Range) (images []byte, labels []uint8) {
	s := d.Stride()
	return d.Images[r.Lo*s : r.Hi*s : r.Hi*s], d.Labels[r.Lo:r.Hi:r.Hi]
}

// Floats writes the normalised pixels of the images of r into dst, which has
// r.Len()*Stride() elements.
func (d *Dataset) Floats(dst []float32, r Range) {
	images, _ := d.Rows(r)
	if len(dst) != len(images) {
		panic("dataset: length of dst is not that of the images")
	}
	var table [256]float32
	for b := range table {
		table[b] = float32(float32(b)*d.Scale) + d.Offset
	}
	for i, b := range images {
		dst[i] = table[b]
	}
}

// Fits returns an error if a model with this input shape and number of classes
// cannot be trained or evaluated on d.
func (d *Dataset) Fits(shape []int, classes int) error {
	if !slices.Equal(d.Shape, shape) {
		return fmt.Errorf("data set %q has images of %s, the model takes %s", d.Name, dims(d.Shape), dims(shape))
	}
	for i, l := range d.Labels {
		if int(l) >= classes {
			return fmt.Errorf("data set %q: label %d of image %d is out of range, the model knows %d classes", d.Name, l, i, classes)
		}
	}
	return nil
}

// build checks what the two files of a data set say about each other.
func build(name string, images, labels *idx) (*Dataset, error) {
	if images.dims[0] != labels.dims[0] {
		return nil, fmt.Errorf("%s has %d images and %s has %d labels: they do not belong together",
			images.name, images.dims[0], labels.name, labels.dims[0])
	}
	d := &Dataset{
		Name:    name,
		Shape:   []int{1, images.dims[1], images.dims[2]},
		Classes: int(slices.Max(labels.data)) + 1,
		Images:  images.data,
		Labels:  labels.data,
	}
	train, _, _ := d.Split()
	if train.Len() == 0 {
		train = d.All()
	}
	pixels, _ := d.Rows(train)
	d.Scale, d.Offset = normalisation(pixels)
	return d, nil
}

// normalisation returns what brings these pixels to mean 0 and deviation 1.
// The sums are integers and each float64 step is rounded, so that every CPU
// gets the same bits. Pixels that are all alike keep deviation 1 of 255.
func normalisation(pixels []byte) (scale, offset float32) {
	var count [256]uint64
	for _, b := range pixels {
		count[b]++
	}
	var sum, squares uint64
	for b, c := range count {
		sum += uint64(b) * c
		squares += uint64(b*b) * c
	}
	n := float64(len(pixels))
	mean := float64(sum) / n
	variance := float64(squares)/n - float64(mean*mean)
	deviation := 255.0
	if variance > 1e-9 {
		deviation = math.Sqrt(variance)
	}
	return float32(1 / deviation), float32(-mean / deviation)
}

// dims formats a shape as "1x28x28".
func dims(shape []int) string {
	return strings.ReplaceAll(strings.Trim(fmt.Sprint(shape), "[]"), " ", "x")
}

// openFolder finds the one pair of IDX files in dir and reads it.
func openFolder(dir fs.FS, name string) (*Dataset, error) {
	entries, err := fs.ReadDir(dir, ".")
	if err != nil {
		return nil, err
	}
	var images, labels []string
	for _, e := range entries {
		switch lower := strings.ToLower(e.Name()); {
		case e.IsDir():
		case before(lower, "images", "idx3"):
			images = append(images, e.Name())
		case before(lower, "labels", "idx1"):
			labels = append(labels, e.Name())
		}
	}
	if err := one(images, "*images*idx3*"); err != nil {
		return nil, err
	}
	// Prefer the labels of the same name: a folder may hold those of another
	// part of the data set too.
	if same := slices.DeleteFunc(slices.Clone(labels), func(l string) bool {
		return stem(l) != stem(images[0])
	}); len(same) > 0 {
		labels = same
	}
	if err := one(labels, "*labels*idx1*"); err != nil {
		return nil, err
	}
	x, err := readFile(dir, images[0], 3)
	if err != nil {
		return nil, err
	}
	y, err := readFile(dir, labels[0], 1)
	if err != nil {
		return nil, err
	}
	return build(name, x, y)
}

// before reports whether b follows a in s.
func before(s, a, b string) bool {
	_, rest, ok := strings.Cut(s, a)
	return ok && strings.Contains(rest, b)
}

// stem is what the names of an image file and of its label file share.
func stem(name string) string {
	return strings.NewReplacer("images", "", "labels", "", "idx3", "", "idx1", "", ".gz", "").Replace(strings.ToLower(name))
}

// one returns an error unless there is exactly one candidate.
func one(candidates []string, pattern string) error {
	const listed = 8
	switch n := len(candidates); {
	case n == 0:
		return fmt.Errorf("the folder has no file %s or %s.gz", pattern, pattern)
	case n == 1:
		return nil
	case n > listed:
		return fmt.Errorf("the folder has %d files %s (%s, ...): leave one in it", n, pattern, strings.Join(candidates[:listed], ", "))
	default:
		return fmt.Errorf("the folder has %d files %s (%s): leave one in it", n, pattern, strings.Join(candidates, ", "))
	}
}

package dataset

import (
	_ "embed"
	"strings"
	"sync"
)

var (
	//go:embed mnist-10k/images-idx3-ubyte.gz
	mnistImages string
	//go:embed mnist-10k/labels-idx1-ubyte.gz
	mnistLabels string

	unpackMNIST10k = sync.OnceValues(func() (*Dataset, error) {
		images, err := readIDX(strings.NewReader(mnistImages), int64(len(mnistImages)), "embedded images-idx3-ubyte.gz", 3)
		if err != nil {
			return nil, err
		}
		labels, err := readIDX(strings.NewReader(mnistLabels), int64(len(mnistLabels)), "embedded labels-idx1-ubyte.gz", 1)
		if err != nil {
			return nil, err
		}
		return build(mnist10k, images, labels)
	})
)

// openMNIST10k unpacks the embedded files on its first call only. Each caller
// gets a Dataset of its own that shares the bytes.
func openMNIST10k() (*Dataset, error) {
	d, err := unpackMNIST10k()
	if err != nil {
		return nil, err
	}
	own := *d
	return &own, nil
}

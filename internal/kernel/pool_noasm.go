//go:build !amd64 || noasm

package kernel

func maxPool2AVX2(dst *float32, codes *int32, top, bottom *float32, pixels, channels, lanes int, relu bool) {
	panic("kernel: no assembly")
}

func maxUnpool2AVX2(top, bottom, sum *float32, codes *int32, src *float32, pixels, channels, lanes int) {
	panic("kernel: no assembly")
}

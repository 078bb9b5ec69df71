//go:build integration

package tensordb_test

import (
	"testing"

	"github.com/spirt-ml/spirt/internal/redistest"
)

func TestConformanceRedis(t *testing.T) {
	conforms(t, conform(t, redistest.WithModule(t).Dial(), "{job:1}:"))
}

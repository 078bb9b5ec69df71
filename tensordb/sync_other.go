//go:build !unix

package tensordb

// syncDir does nothing: here a rename is durable by itself (NTFS journals it),
// and folders cannot be synced.
func syncDir(dir string) error { return nil }

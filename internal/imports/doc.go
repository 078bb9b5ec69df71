// Package imports holds no code but a test: that packages import each other
// only downwards, as the table in it and ARCHITECTURE.md say.
package imports
